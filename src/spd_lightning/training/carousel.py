"""Real decoding under ZeRO stage 3, where no rank holds a layer: the layers pass by, one after another, all the time.

Bringing a layer together is a meeting of all ranks, and every rank decodes other prompts: one is in its prefill, one
has two stages at work, one is done. So ranks do not ask for layers. Layers 0, 1, .., L - 1, 0, 1, .. are gathered in
this order, whoever needs them; a rank that needs layer i lets the others pass. A cycle of the pipeline, a prefill and a
step of plain decoding each take one round, because a cycle runs its stages in the order of their layers. At the start
of every round the ranks tell whether they still have work; the round in which none has is the last. No order of
prompts, no number of cycles can make two ranks wait for different layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import lightning as L
import torch
from torch import nn

from spd_lightning.head.module import SpeculationHead
from spd_lightning.target.gathering import gathered, in_pieces
from spd_lightning.target.target import Target

Turn = Callable[[], AbstractContextManager[None]]


class Carousel:
    """Gathers layers in a fixed order of rounds.

    Args:
        layers: modules, in the order in which they are used.
        agree: whether any rank still has work, given whether this one has; a meeting of all ranks.
        gather: brings a module's weights together; a meeting of all ranks.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        agree: Callable[[bool], bool],
        gather: Callable[[nn.Module], AbstractContextManager[Any]] = gathered,
    ) -> None:
        self.layers, self.agree, self.gather = layers, agree, gather
        self.at = -1
        self.rounds = 0
        self._held: AbstractContextManager[Any] = nullcontext()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Within it the layers may be called; at its end this rank waits, taking part, until all have left theirs."""
        hooks = [layer.register_forward_pre_hook(self._needed(index)) for index, layer in enumerate(self.layers)]
        try:
            yield
            while self._next(busy=False):
                pass
        finally:
            for hook in hooks:
                hook.remove()

    def _needed(self, index: int) -> Callable[..., None]:
        def hook(*unused: Any) -> None:
            while self.at != index:
                self._next(busy=True)

        return hook

    def _next(self, busy: bool) -> bool:
        """Pass on to the next layer; False when a round would begin and no rank has work."""
        # what a gathered weight is made of must not be inference tensors: training goes on with it
        with torch.inference_mode(False), torch.no_grad():
            self._held.__exit__(None, None, None)
            self._held, self.at = nullcontext(), (self.at + 1) % len(self.layers)
            if self.at == 0:
                if not self.agree(busy):
                    self.at = -1
                    return False
                self.rounds += 1
            self._held = self.gather(self.layers[self.at])
            self._held.__enter__()
        return True


@contextmanager
def whole_weights(target: Target, head: SpeculationHead, trainer: L.Trainer) -> Iterator[Turn]:
    """Let this rank decode: yields what every rank enters around each of its prompts, equally often on all ranks.

    What is no layer of the target (embedding, norm, lm_head, the head) is gathered for the whole time.
    """
    if not in_pieces(target):
        yield nullcontext
        return
    layers = [target.layer(index) for index in range(target.num_layers)]
    of_layers = {parameter for layer in layers for parameter in layer.parameters()}
    rest = nn.ParameterList(p for p in [*target.parameters(), *head.parameters()] if p not in of_layers)
    with _hooks_removed(trainer), gathered(rest):
        yield Carousel(layers, lambda busy: trainer.strategy.reduce_boolean_decision(busy, all=False)).turn


@contextmanager
def _hooks_removed(trainer: L.Trainer) -> Iterator[None]:
    """DeepSpeed's hooks gather a module when it is called and cut it afterwards; here that is done by rounds."""
    engine: Any = trainer.strategy.model
    engine.empty_partition_cache()
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    for hook in [*offload.forward_hooks, *offload.backward_hooks]:
        hook.remove()
    offload.forward_hooks, offload.backward_hooks = [], []
    try:
        yield
    finally:
        offload._register_deepspeed_module(offload.module)
