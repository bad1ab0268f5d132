"""DeepSpeed ZeRO through Lightning: the stock strategy on GPUs, the same code over gloo on CPUs.

`trainer.strategy` takes Lightning's own names: deepspeed_stage_1, _2, _3, each with _offload. What differs from stock:

- the frozen target is in no checkpoint, and no missing or foreign weight of the head goes unnoticed;
- a checkpoint appears under its name when it is complete, never before (`saving`);
- a checkpoint of any strategy and any number of ranks can be resumed (`resuming`): the same stage on as many ranks bit
  by bit, by DeepSpeed itself; any other is merged, and every rank takes its part;
- a step whose gradients are not finite is left out in any precision, as DeepSpeed does for float16;
- torch's AdamW is used, on the CPU (offload) its fused kernel: no compiler is needed.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, StrategyRegistry
from torch import nn

from spd_lightning.errors import InputError
from spd_lightning.target.loading import Loading
from spd_lightning.training import resuming
from spd_lightning.training.resuming import shape_of
from spd_lightning.training.saving import SavedWhole, remove_checkpoint

#: Strategies by the names that Lightning gives them: (ZeRO stage, optimizer state in host memory).
ZERO_STRATEGIES = {
    "deepspeed": (2, False),
    "deepspeed_stage_1": (1, False),
    "deepspeed_stage_1_offload": (1, True),
    "deepspeed_stage_2": (2, False),
    "deepspeed_stage_2_offload": (2, True),
    "deepspeed_stage_3": (3, False),
    "deepspeed_stage_3_offload": (3, True),
}
#: What a run may be spread by, for messages.
_NAMES = ", ".join(("auto", "ddp", *ZERO_STRATEGIES))


class ZeroStrategy(DeepSpeedStrategy):
    """DeepSpeed ZeRO stages 1 to 3 for a trained head beside a frozen target.

    Args:
        stage: 1 shards the optimizer's state, 2 gradients too, 3 also all weights, the frozen target's included.
        offload_optimizer: keep the optimizer's state, and its arithmetic, in host memory.
        timeout_seconds: how long a rank waits for the others in a collective.
        settings: anything else of Lightning's DeepSpeedStrategy.
    """

    strategy_name = "deepspeed"

    def __init__(
        self, stage: int = 2, offload_optimizer: bool = False, timeout_seconds: float = 1800, **settings: Any
    ) -> None:
        defaults: dict[str, Any] = {
            "exclude_frozen_parameters": True,
            "timeout": timedelta(seconds=timeout_seconds),
            "logging_batch_size_per_gpu": 1,
        }
        super().__init__(stage=stage, offload_optimizer=offload_optimizer, **(defaults | settings))
        assert isinstance(self.config, dict)
        self.config.setdefault("zero_force_ds_cpu_optimizer", False)

    # -- on CPUs -----------------------------------------------------------------------------------------------------

    @property
    def on_cpu(self) -> bool:
        return isinstance(self.accelerator, CPUAccelerator)

    def setup_environment(self) -> None:
        if self.on_cpu:
            os.environ["DS_ACCELERATOR"] = "cpu"  # before anything imports deepspeed's accelerator
            DDPStrategy.setup_environment(self)  # type: ignore[arg-type]
        else:
            super().setup_environment()

    def setup_distributed(self) -> None:
        if not self.on_cpu:
            return super().setup_distributed()
        import deepspeed.ops

        reset_seed()
        self.set_world_ranks()
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would compile C++
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(self, model: nn.Module, optimizer: Any, lr_scheduler: Any = None) -> Any:
        trained = [p for p in model.parameters() if p.requires_grad]
        assert isinstance(self.config, dict)
        buckets = self.config["zero_optimization"]
        for name in ("reduce_bucket_size", "allgather_bucket_size"):  # DeepSpeed allocates them whole
            size = sum(math.prod(shape_of(p)) for p in trained)
            buckets[name] = max(1, min(buckets.get(name, size), size))
        if not self.on_cpu:
            engine, wrapped = super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)
        else:
            engine, wrapped = self._initialized(model, self.config, trained, optimizer, lr_scheduler)
        if hasattr(wrapped, "check_grad_overflow"):
            wrapped.check_grad_overflow = True
        return engine, wrapped

    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        if not self.on_cpu:
            return super()._initialize_deepspeed_inference(model)
        assert isinstance(self.config, dict)
        names = ("bf16", "zero_allow_untested_optimizer", "zero_optimization")
        kept = {name: self.config[name] for name in names[: 3 if self.zero_stage_3 else 1] if name in self.config}
        self.model, _ = self._initialized(model, {"train_micro_batch_size_per_gpu": 1} | kept, [])

    def _initialized(
        self, model: nn.Module, config: Any, trained: list[nn.Parameter], optimizer: Any = None, scheduler: Any = None
    ) -> tuple[Any, Any]:
        """DeepSpeed's engine and optimizer; Lightning would name a device by its index, which a CPU has not."""
        import deepspeed

        engine, wrapped, _, _ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=self.local_rank),
            config=config,
            model=model,
            model_parameters=trained,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            dist_init_required=False,
        )
        return engine, wrapped

    # -- weights in pieces -------------------------------------------------------------------------------------------

    @property
    def stage(self) -> int:
        assert isinstance(self.config, dict)
        return int(self.config["zero_optimization"]["stage"])

    @property
    def offloads(self) -> bool:
        """Whether the optimizer works in host memory."""
        assert isinstance(self.config, dict)
        return "offload_optimizer" in self.config["zero_optimization"]

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Nothing is cut while the model is built: `cut` does it afterwards, see there."""
        self._init_config_if_needed()
        yield

    def cut(self, *modules: nn.Module) -> None:
        """Under stage 3, leave each rank its piece of the weights and buffers that rank 0 holds.

        The other ranks hand in modules of the same shapes on the meta device: a target is read by one process, whole
        in no memory but that one's, weight by weight on the way to the others.
        """
        import deepspeed
        import torch.distributed as dist

        kept: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay tied
        for owner in (owner for module in modules for owner in reversed(list(module.modules()))):
            for name, parameter in list(owner.named_parameters(recurse=False)):
                if parameter.is_meta and parameter not in kept:
                    empty = torch.empty_like(parameter, device=self.root_device)
                    kept[parameter] = nn.Parameter(empty, parameter.requires_grad)
                owner._parameters[name] = parameter = kept.get(parameter, parameter)
                if not hasattr(parameter, "ds_id"):
                    parameter.data = parameter.data.to(self.weight_dtype)
            for name, buffer in list(owner.named_buffers(recurse=False)):
                place = torch.empty_like(buffer, device=self.root_device) if buffer.is_meta else buffer
                owner._buffers[name] = place = place.to(self.root_device)
                dist.broadcast(place, 0)
            if owner._parameters:
                # what is cut already, such as a child's, it leaves alone
                deepspeed.zero.Init(module=owner, config_dict_or_path=self.config)

    @property
    def weight_dtype(self) -> torch.dtype:
        """In which DeepSpeed wants the weights that compute."""
        precision = self.precision_plugin.precision
        return {"bf16": torch.bfloat16, "16": torch.float16}.get(str(precision).split("-")[0], torch.float32)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        final = Path(self.broadcast(str(filepath)))
        with SavedWhole(final, self.is_global_zero, self.barrier) as temporary:
            super().save_checkpoint(checkpoint, temporary, storage_options)

    def remove_checkpoint(self, filepath: Any) -> None:
        if self.is_global_zero:
            remove_checkpoint(Path(filepath))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path, module = Path(checkpoint_path), self.lightning_module
        assert module is not None
        header = resuming.read_header(path)
        resuming.check_weights(header.shapes, module, f"ckpt_path={str(path)!r}")
        trains = module.trainer.state.fn == "fit"
        if trains and (header.stage, header.ranks) == (self.stage, self.world_size):
            return super().load_checkpoint(path, weights_only)
        fields = resuming.read_merged(path)
        resuming.load_into_engine(fields, module, self.deepspeed_engine)
        return {name: value for name, value in fields.items() if name not in ("state_dict", "optimizer_states")}

    # -- steps -------------------------------------------------------------------------------------------------------

    def backward(self, closure_loss: torch.Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Lightning has divided by the number of micro-batches; DeepSpeed would once more, and clipping would see it
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    @property
    def step_applied(self) -> bool:
        """Whether the last optimizer step changed the weights; it does not where gradients were not finite."""
        return bool(self.deepspeed_engine.was_step_applied())


def register() -> None:
    """Put ZeroStrategy behind Lightning's names of DeepSpeed strategies."""
    for name, (stage, offload) in ZERO_STRATEGIES.items():
        StrategyRegistry.register(
            name,
            ZeroStrategy,
            description=f"DeepSpeed ZeRO stage {stage}{', optimizer in host memory' if offload else ''}",
            override=True,
            stage=stage,
            offload_optimizer=offload,
        )


def check_name(name: Any) -> None:
    """Refuse a name of no strategy; Lightning would list some of its own. An object that is no name passes.

    Raises:
        InputError: naming ours.
    """
    if isinstance(name, str) and name != "auto" and name not in StrategyRegistry:
        raise InputError(f"trainer.strategy={name!r}: expected {_NAMES}.")


def check(strategy: Any, precision: str, loading: Loading) -> None:
    """Refuse what would fail in the middle of a run, or in riddles.

    Args:
        strategy, precision: the trainer's.
        loading: of the target.

    Raises:
        InputError: naming the field.
    """
    if isinstance(strategy, DeepSpeedStrategy) and not isinstance(strategy, ZeroStrategy):
        raise InputError(
            "trainer.strategy: expected spd_lightning.training.strategies.ZeroStrategy instead of Lightning's "
            "DeepSpeedStrategy, whose checkpoints would hold the frozen target."
        )
    if isinstance(strategy, DDPStrategy) and strategy._start_method != "popen":
        # spawned ranks cannot be sent a run; what forked ones count and log never gets back to this process
        how = strategy._start_method
        raise InputError(
            f"trainer.strategy: ddp_spawn, ddp_fork and ddp_notebook start ranks by {how}, from which a run does not "
            f"come back whole: expected {_NAMES}."
        )
    if isinstance(strategy, ZeroStrategy) and precision in ("16-true", "bf16-true"):
        raise InputError(
            f"trainer.precision={precision!r} with DeepSpeed: set it to bf16-mixed, which keeps float32 master weights "
            "(the weights that compute are bfloat16 in both)."
        )
    if isinstance(strategy, ZeroStrategy) and precision == "32-true" and loading.dtype not in ("auto", "float32"):
        raise InputError(
            f"model.loading.dtype={loading.dtype!r} with DeepSpeed and trainer.precision=32-true: expected auto or "
            "float32, since DeepSpeed computes in one dtype. Or set trainer.precision to bf16-mixed."
        )
    if isinstance(strategy, ZeroStrategy) and strategy.stage == 3:
        for name, value in (("quantization", loading.quantization), ("device_map", loading.device_map)):
            if value not in (None, "none"):
                raise InputError(
                    f"model.loading.{name}={value!r} with deepspeed_stage_3, which places the target's weights itself: "
                    "leave it out, or choose another trainer.strategy."
                )
