"""Caches of one shape whose position is a tensor on the device: what a CUDA graph needs to be replayed.

A graph repeats the same kernels on the same addresses with the same shapes, so a length may be no Python integer, and
nothing may be allocated, sliced or decided from token to token. Here

- full and sliding attention keep `capacity` places and hand out all of them; a mask made from the position tensor hides
  what lies behind it (and before the window), so going back is a smaller position and nothing else;
- a recurrent layer keeps a ring of snapshots: the states after p tokens lie in slot p modulo the ring's size.

A stage that has no token computes all the same, at the *spare* position capacity - 1: its keys and values go to that
place, which no true token sees, and its recurrent states to a slot behind the ring. The caches of `target.cache` are
filled by the prompt and copied here.

Shapes: B = 1, K key/value heads, D head_dim; positions are int64 [1].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin

from spd_lightning.target.cache import FullAttentionLayer, RecurrentLayer, RollbackCache, SlidingAttentionLayer


def spare_position(capacity: int) -> int:
    """Where tokens that do not exist are computed; true positions are smaller."""
    return capacity - 1


def hidden_score(dtype: torch.dtype) -> float:
    """What an additive mask holds for places that are not seen: far below every score, and finite in every kernel.

    Half of the least number, because some kernels scale scores by log2(e) once the mask is added.
    """
    return torch.finfo(dtype).min / 2


class StaticPosition:
    """The position of a stage's token, and what all its layers derive from it. Fixed addresses, new values per cycle.

    Attributes:
        value: int64 [1], written from outside before every cycle.
        masks: additive attention masks [1, 1, 1, capacity] by kind of layer; every row sees its own position.
        read, write: int64 [1], the slots of the states before and after this token.
    """

    def __init__(
        self, value: Tensor, capacity: int, rollback: int, window: int | None, kinds: Sequence[str], dtype: torch.dtype
    ) -> None:
        self.value, self.capacity, self.window = value, capacity, window
        self.slots = rollback + 1
        self._places = torch.arange(capacity, device=value.device)
        self._hidden = torch.full((), hidden_score(dtype), dtype=dtype, device=value.device)
        self._seen = torch.zeros((), dtype=dtype, device=value.device)
        self._recurrent = "linear_attention" in kinds
        attending = [kind for kind in dict.fromkeys(kinds) if kind != "linear_attention"]
        self.masks = {kind: self._seen.new_zeros(1, 1, 1, capacity) for kind in attending}
        self._outside = torch.full_like(value, self.slots)  # a number in `where` would come from the host
        self.read, self.write = torch.zeros_like(value), torch.zeros_like(value)

    def refresh(self) -> None:
        """Derive anew from `value` what the layers of this stage need; small kernels, but a stage waits for each."""
        for kind, mask in self.masks.items():
            seen = self._places <= self.value
            if kind == "sliding_attention":
                assert self.window is not None
                seen &= self._places > self.value - self.window
            torch.where(seen, self._seen, self._hidden, out=mask[0, 0, 0])
        if not self._recurrent:
            return
        # what is not there reads a true state, which harms nobody, and writes behind the ring
        absent = self.value == spare_position(self.capacity)
        torch.remainder(self.value, self.slots, out=self.read)
        torch.where(absent, self._outside, (self.value + 1) % self.slots, out=self.write)


class StaticAttentionLayer(CacheLayerMixin):
    """Keys and values [1, K, capacity, D] of one layer, full or sliding: the mask makes the difference."""

    is_sliding = False

    def __init__(self, position: StaticPosition) -> None:
        super().__init__()
        self.position = position

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def buffer(states: Tensor) -> Tensor:
            batch, heads, _, head_dim = states.shape
            return states.new_zeros(batch, heads, self.position.capacity, head_dim)

        self.keys, self.values = buffer(key_states), buffer(value_states)
        self.is_initialized = True

    def load(self, source: FullAttentionLayer) -> None:
        """Take over a prompt's keys and values; what lies behind it stays and is hidden."""
        assert source.keys is not None and source.values is not None
        if not self.is_initialized:
            self.lazy_initialization(source.keys, source.values)
        first = source.first if isinstance(source, SlidingAttentionLayer) else 0
        count = source.length - first
        for ours, theirs in zip(self.buffers, (source.keys, source.values), strict=True):
            ours[:, :, first : source.length] = theirs[:, :, :count]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.buffers
        keys.index_copy_(2, self.position.value, key_states)
        values.index_copy_(2, self.position.value, value_states)
        return keys, values

    @property
    def buffers(self) -> list[Tensor]:
        """Everything it holds; allocated by the first prompt, and never again."""
        return [buffer for buffer in (self.keys, self.values) if buffer is not None]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.position.capacity, 0

    def get_seq_length(self) -> int:
        raise NotImplementedError("the length of a static cache is a tensor: `position`")

    def get_max_length(self) -> int:
        return self.position.capacity


class StaticRecurrentLayer(LinearAttentionCacheLayerMixin):
    """The convolution's [slots + 1, channels, kernel] and the recurrent state [slots + 1, heads, ...] of one layer."""

    is_sliding = False

    def __init__(self, position: StaticPosition) -> None:
        super().__init__()
        self.position = position
        self._conv: Tensor | None = None
        self._recurrent: Tensor | None = None
        self._absorbed: Tensor | None = None  # the convolution's state that the layer is updating in place

    def lazy_initialization(
        self, conv_states: Tensor | None = None, recurrent_states: Tensor | None = None, state_idx: int = 0
    ) -> None:
        slots = self.position.slots + 1
        if conv_states is not None:
            self._conv = conv_states.new_zeros(slots, *conv_states.shape[1:])
        if recurrent_states is not None:
            self._recurrent = recurrent_states.new_zeros(slots, *recurrent_states.shape[1:])

    def load(self, source: RecurrentLayer) -> None:
        """Take over the states at the end of a prompt."""
        conv, recurrent = source.conv_state, source.recurrent_state
        assert conv is not None and recurrent is not None
        if self._conv is None:
            self.lazy_initialization(conv, recurrent)
        slot = source.length % self.position.slots
        for ours, theirs in zip(self.buffers, (conv, recurrent), strict=True):
            ours[slot] = theirs[0]

    @property
    def buffers(self) -> list[Tensor]:
        """Everything it holds; allocated by the first prompt, and never again."""
        return [buffer for buffer in (self._conv, self._recurrent) if buffer is not None]

    def next_conv_state(self) -> Tensor:
        """A copy of the convolution's state, which the layer updates in place; stored with the recurrent one."""
        assert self._conv is not None
        self._absorbed = self._conv.index_select(0, self.position.read)
        return self._absorbed

    def recurrent_state(self) -> Tensor:
        assert self._recurrent is not None
        return self._recurrent.index_select(0, self.position.read)

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, **kwargs: object) -> Tensor:
        raise NotImplementedError("a static cache takes one token at a time: a prompt is loaded")

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: object) -> Tensor:
        assert self._conv is not None and self._recurrent is not None and self._absorbed is not None
        self._conv.index_copy_(0, self.position.write, self._absorbed)
        self._recurrent.index_copy_(0, self.position.write, recurrent_states.to(self._recurrent.dtype))
        return recurrent_states


StaticLayer = StaticAttentionLayer | StaticRecurrentLayer


class StaticCache(Cache):
    """One static layer per decoder layer; passed to transformers' layers as `past_key_values`.

    Args:
        kinds: kind of every decoder layer (see `layer_kinds`).
        positions: the position of the stage that each of these layers belongs to.
    """

    def __init__(self, kinds: Sequence[str], positions: Sequence[StaticPosition]) -> None:
        self.static_layers: list[StaticLayer] = [
            StaticRecurrentLayer(position) if kind == "linear_attention" else StaticAttentionLayer(position)
            for kind, position in zip(kinds, positions, strict=True)
        ]
        super().__init__(layers=list(self.static_layers))

    def load(self, source: RollbackCache) -> None:
        """Take over a prompt. Everything is allocated by the first one; later ones are copied to the same addresses."""
        for ours, theirs in zip(self.static_layers, source.rollback_layers, strict=True):
            if isinstance(ours, StaticRecurrentLayer):
                assert isinstance(theirs, RecurrentLayer)
                ours.load(theirs)
            else:
                assert isinstance(theirs, FullAttentionLayer)
                ours.load(theirs)

    @property
    def buffers(self) -> list[Tensor]:
        return [buffer for layer in self.static_layers for buffer in layer.buffers]

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        layer = self.static_layers[layer_idx]
        assert isinstance(layer, StaticRecurrentLayer)
        return layer.next_conv_state()

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        layer = self.static_layers[layer_idx]
        assert isinstance(layer, StaticRecurrentLayer)
        return layer.recurrent_state()
