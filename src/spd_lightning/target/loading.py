"""Load a Hugging Face causal language model as a frozen target, refusing early what cannot work."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PretrainedConfig

from spd_lightning.errors import InputError, first_line
from spd_lightning.staircase import resolve_stage_layers
from spd_lightning.target.families import unsupported_reason
from spd_lightning.target.identity import TargetIdentity, identity_of
from spd_lightning.target.target import Target, is_placed


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device, field: str = "dtype") -> torch.dtype:
    """`auto`/None: bfloat16 on a GPU, float32 on a CPU; names as in torch otherwise."""
    if dtype is None or dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if resolved not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise InputError(f"{field}={dtype!r}: expected auto, float32, bfloat16, float16 or float64.")
    assert isinstance(resolved, torch.dtype)
    return resolved


def embedded_target_path() -> Path:
    """The tiny documentation target that ships with the package (`tiny`)."""
    return Path(__file__).resolve().parent.parent / "embedded" / "target"


@dataclass(frozen=True)
class Loading:
    """How the frozen target is loaded.

    Args:
        revision: hub revision (branch, tag or commit) of target and tokenizer.
        dtype: of the weights: auto is bfloat16 on a GPU, float32 on a CPU.
        attention: kernel of the target's attention layers: auto, eager, sdpa, flash_attention_2, ...
        device_map: auto spreads a target that is larger than one device over all of them, then memory, then disk;
            or a mapping of module names to devices. Needs accelerate, and one process (trainer.devices 1).
        offload_folder: where weights lie that a device_map puts on disk.
        quantization: 8bit or 4bit loads quantised weights by bitsandbytes, which needs a GPU.
        offline: use nothing but what is on this machine already.
        trust_remote_code: run code that comes with the model; never unless you have read it.
    """

    revision: str | None = None
    dtype: str = "auto"
    attention: str = "auto"
    device_map: str | dict[str, int | str] | None = field(default=None, hash=False)
    offload_folder: str | None = None
    quantization: Literal["none", "8bit", "4bit"] = "none"
    offline: bool = False
    trust_remote_code: bool = False

    @property
    def source(self) -> dict[str, Any]:
        """What decides which files are read: config, tokenizer and weights are asked for alike."""
        return {
            "revision": self.revision,
            "local_files_only": self.offline,
            "trust_remote_code": self.trust_remote_code,
        }

    def check(self, named: Naming = "loading.{}".format) -> None:
        """Refuse what cannot work on this machine.

        Args:
            named: how the user wrote a field, for messages.

        Raises:
            InputError: naming the field.
        """
        resolve_dtype(self.dtype, torch.device("cpu"), named("dtype"))
        quantization, device_map = named("quantization"), named("device_map")
        if self.quantization not in ("none", "8bit", "4bit"):
            raise InputError(f"{quantization}={self.quantization!r}: expected none, 8bit or 4bit.")
        if self.quantization != "none":
            if find_spec("bitsandbytes") is None:
                raise InputError(
                    f"{quantization}={self.quantization} needs the package bitsandbytes, which is not installed: "
                    "pip install 'spd_lightning[large]', or set it to none."
                )
            if not torch.cuda.is_available():
                raise InputError(
                    f"{quantization}={self.quantization} needs a GPU, and torch finds none here: set it to none."
                )
        if (self.device_map is not None or self.quantization != "none") and find_spec("accelerate") is None:
            raise InputError(
                f"{device_map} and {quantization} need the package accelerate, which is not installed: pip install "
                "'spd_lightning[train]'."
            )
        if isinstance(self.device_map, str) and self.device_map not in _STRATEGIES:
            _check_place(self.device_map, f"{device_map}={self.device_map!r}")
        elif isinstance(self.device_map, dict):
            for module, place in self.device_map.items():
                if place != "disk":
                    _check_place(place, f"{device_map} puts {module!r} on {place!r}")
        if self.offload_folder is not None and self.device_map is None:
            raise InputError(
                f"{named('offload_folder')}={self.offload_folder!r} is used by nothing: set {device_map} too."
            )


Naming = Callable[[str], str]
_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


def _check_place(place: int | str, what: str) -> None:
    try:
        device = torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"{what}: expected {', '.join(_STRATEGIES)}, or modules and their devices (0, 1, cuda:0, cpu, disk)."
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"{what}: torch finds {torch.cuda.device_count()} GPUs here.")


def load_target(
    path_or_id: str | Path,
    num_stages: int | None = None,
    stage_layers: Sequence[int] | Literal["auto"] | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    loading: Loading | None = None,
) -> Target:
    """Load and freeze a causal language model, cut into stages where `num_stages` or `stage_layers` is given.

    Args:
        path_or_id: a local folder, a hub id, or `tiny` for the embedded target.
        num_stages: n; a balanced split of the L layers.
        stage_layers: layers per stage by hand, whose sum is L; or `auto`: measured, see `measured_split`.
        dtype: `auto` (default): bfloat16 on a GPU, float32 on a CPU.
        device: default `cpu`; move the target like any module.
        revision: hub revision.
        loading: everything else that can be chosen; `dtype` and `revision`, where given, win over its own.

    Raises:
        InputError: for a missing or truncated folder, an unsupported family or an impossible split; all but truncated
            weights are found before any weight is read.
    """
    from transformers import AutoModelForCausalLM

    loading = loading or Loading()
    loading = replace(loading, revision=revision or loading.revision)
    config = check_target(path_or_id, loading=loading)
    split = None
    if stage_layers == "auto":
        if num_stages is None:
            raise InputError("stage_layers='auto': set num_stages too, the number of stages to balance.")
        resolve_stage_layers(config.get_text_config().num_hidden_layers, num_stages)
    elif num_stages is not None or stage_layers is not None:
        split = resolve_stage_layers(config.get_text_config().num_hidden_layers, num_stages, stage_layers)
    place = torch.device(device or "cpu")
    kind = resolve_dtype(dtype or loading.dtype, place)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            _source(path_or_id),
            dtype=kind,
            output_loading_info=True,
            **loading.source,
            **_placement(loading, config, place, kind),
        )
    except (ImportError, AssertionError, NotImplementedError) as error:  # a package, kernel or device is missing
        raise InputError(
            f"target={str(path_or_id)!r} cannot be loaded in this way: {first_line(error)} See model.loading (dtype, "
            "device_map, quantization), and quantization_config in its config.json."
        ) from error
    except Exception as error:  # safetensors, torch, OS and hub errors have no common base
        raise InputError(
            f"target={str(path_or_id)!r}: its weights cannot be read ({first_line(error)}). Expected complete "
            "*.safetensors files that match config.json; download or copy the model again."
        ) from error
    model, found = loaded
    if missing := sorted(found["missing_keys"]):  # transformers would leave them random
        raise InputError(
            f"target={str(path_or_id)!r}: its weights lack {missing[0]} ({len(missing)} tensors that config.json "
            "describes). Expected complete *.safetensors files that match config.json."
        )
    if not is_placed(model):
        model.to(place)
    target = Target(model, split, source=str(path_or_id), loading=loading)
    if stage_layers == "auto":
        from spd_lightning.target.balance import measured_split

        assert num_stages is not None
        target.partition(stage_layers=measured_split(target, num_stages).stage_layers)
    return target


def shapes_of_target(path_or_id: str | Path, loading: Loading | None = None) -> Target:
    """A target without its weights, on the meta device; raises as `check_target` does."""
    from spd_lightning.target.sizes import weightless_target

    loading = loading or Loading()
    config = check_target(path_or_id, loading)
    if loading.attention != "auto":
        config._attn_implementation = loading.attention
    target = weightless_target(config)
    target.source, target.loading = str(path_or_id), loading
    return target


def _placement(loading: Loading, config: PretrainedConfig, place: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of `from_pretrained` that say where weights go and how they are stored."""
    arguments: dict[str, Any] = {}
    if loading.attention != "auto":
        arguments["attn_implementation"] = loading.attention
    if loading.device_map is not None:
        arguments |= {"device_map": loading.device_map, "offload_folder": loading.offload_folder}
    if loading.quantization != "none":
        from transformers import BitsAndBytesConfig

        arguments["quantization_config"] = (
            BitsAndBytesConfig(load_in_8bit=True)
            if loading.quantization == "8bit"
            else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        )
    if loading.quantization != "none" or getattr(config, "quantization_config", None) is not None:
        arguments.setdefault("device_map", {"": place})  # quantised weights cannot be moved afterwards
    return arguments


def check_target(
    path_or_id: str | Path,
    loading: Loading | None = None,
    named: Naming = "loading.{}".format,
    needs_weights: bool = True,
) -> PretrainedConfig:
    """The target's configuration, refused where it cannot be a target; reads no weight.

    Args:
        path_or_id, loading: as in `load_target`.
        named: how the user wrote a field of `loading`, for messages.
        needs_weights: refuse a folder without weights.

    Raises:
        InputError: for a missing or damaged folder, an unsupported family, or a way of loading that cannot work here.
    """
    from transformers import AutoConfig

    loading = loading or Loading()
    loading.check(named)
    source = _source(path_or_id)
    _check_folder(source, needs_weights)
    if loading.revision is not None and Path(source).is_dir():
        warnings.warn(f"{named('revision')}={loading.revision!r} is not used: a folder has no revisions.", stacklevel=2)
    try:
        config = AutoConfig.from_pretrained(source, **loading.source)
    except Exception as error:  # a field of a wrong type raises an error class of huggingface_hub's own
        if Path(source).is_dir():
            raise InputError(f"target={str(path_or_id)!r} has no readable config.json: {first_line(error)}") from error
        raise InputError(
            f"target={str(path_or_id)!r} is no folder here, and the hub did not give its config.json: "
            f"{first_line(error)} Give a folder that holds a model, 'tiny', or the id of a model that this machine can "
            "fetch or has in its cache."
        ) from error
    if reason := unsupported_reason(config):
        raise InputError(f"target={str(path_or_id)!r} cannot be a target: {reason}.")
    if loading.attention != "auto":
        _check_attention(config, loading.attention, named("attention"))
    return config


def target_identity(path_or_id: str | Path, loading: Loading | None = None) -> TargetIdentity:
    """Who a target is, from its config.json and its tokenizer alone; a target without a tokenizer has no digest of it.

    Raises:
        InputError: for a missing or damaged folder or an unsupported family.
    """
    loading = loading or Loading()
    config = check_target(path_or_id, replace(loading, attention="auto"))
    try:
        tokenizer = load_tokenizer(path_or_id, loading)
    except InputError as error:
        warnings.warn(f"{first_line(error)} A head is not checked against this tokenizer.", stacklevel=2)
        tokenizer = None
    local = Path(path_or_id).is_dir()  # a path means nothing elsewhere
    source = Path(path_or_id).resolve().name if local else str(path_or_id)
    return identity_of(config, source, None if local else loading.revision, tokenizer=tokenizer)


def _check_attention(config: PretrainedConfig, attention: str, field: str) -> None:
    """Refuse a kernel that the family or this machine does not have, by building the model without weights."""
    from transformers import AutoModelForCausalLM

    if attention.startswith("paged|"):
        raise InputError(
            f"{field}={attention!r}: paged kernels need a cache that cannot roll back. Leave out 'paged|'."
        )
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    except Exception as error:  # ImportError, ValueError, ...: whatever the kernel's package raises
        raise InputError(
            f"{field}={attention!r} cannot be used here: {first_line(error)} Expected auto, eager, sdpa, "
            "flash_attention_2 or another kernel that the model supports."
        ) from error


def load_tokenizer(path_or_id: str | Path, loading: Loading | None = None):  # type: ignore[no-untyped-def]
    """The target's tokenizer; InputError where it is missing or damaged."""
    from transformers import AutoTokenizer

    source = _source(path_or_id)
    _check_folder(source)
    try:
        return AutoTokenizer.from_pretrained(source, **(loading or Loading()).source)
    except Exception as error:  # the Rust tokenizer raises bare Exception for damaged files
        raise InputError(
            f"the tokenizer of {str(path_or_id)!r} cannot be read: {first_line(error)} Expected a model's folder or "
            "hub id (data.tokenizer, --tokenizer or --target)."
        ) from error


def _source(path_or_id: str | Path) -> str | Path:
    return embedded_target_path() if str(path_or_id) == "tiny" else path_or_id


def _check_folder(source: str | Path, needs_weights: bool = True) -> None:
    """A local path that exists must look like a model folder; anything else is left to the hub."""
    path = Path(source)
    if path.is_dir():
        config = path / "config.json"
        if not config.is_file():
            raise InputError(f"target={str(path)!r} is a folder without config.json: expected a Hugging Face model.")
        try:
            json.loads(config.read_text())
        except ValueError as error:
            raise InputError(f"{config} is not valid JSON ({error}): the file is truncated or damaged.") from error
        if needs_weights and not list(path.glob("*.safetensors")) and not list(path.glob("*.bin")):
            raise InputError(f"target={str(path)!r} has no weights: expected model.safetensors in the folder.")
    elif path.exists():
        raise InputError(f"target={str(path)!r} is a file: expected a model folder or a hub id.")
    elif path.is_absolute() or str(source).startswith((".", "~")):
        raise InputError(f"target={str(source)!r} does not exist: expected a model folder, a hub id or 'tiny'.")
