"""Caches that roll back: after a rejected draft every layer returns to the state after the last true token.

Stage s of n works s tokens behind stage 0, so every layer has its own length, and a rejection takes back n - 1 - s
tokens from it (method: rollback). Nothing is copied and nothing allocated to go back, whatever the kind of layer:

- full attention keeps every position in one preallocated buffer; going back moves its length;
- a sliding window keeps, besides the window, the positions that going back would make visible again;
- a recurrent layer (gated delta rule: a convolution's and a recurrent state) keeps a ring of n - s snapshots, the
  states after its last n - s tokens; going back moves the index. The step forward writes into the next slot.

The library's own layers concatenate (a copy of the whole cache per token and layer), forget what slides out of the
window, and cannot take a recurrent state back.

Shapes: B batch, K key/value heads, T positions, D head_dim; a convolution's state is [B, channels, kernel].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin


class FullAttentionLayer(CacheLayerMixin):
    """Keys and values [B, K, capacity, D] of one layer, of which `length` positions are valid."""

    is_sliding = False
    is_croppable = True

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        def buffer(states: Tensor) -> Tensor:
            batch, heads, _, head_dim = states.shape
            return states.new_zeros(batch, heads, self.capacity, head_dim)

        self.keys, self.values = buffer(key_states), buffer(value_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        start, self.length = self.length, self.length + key_states.shape[-2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    @property
    def buffers(self) -> list[Tensor]:
        """Everything it holds; allocated by the first tokens, and never again."""
        return [buffer for buffer in (self.keys, self.values) if buffer is not None]

    def truncate(self, length: int) -> None:
        self.length = min(self.length, length)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity

    def reset(self) -> None:
        self.length = 0


class SlidingAttentionLayer(FullAttentionLayer):
    """Keys and values of a layer whose tokens see the last `window` positions, themselves included.

    The buffer holds `first`, `first` + 1, ...: at least the window - 1 + rollback newest positions, so that the whole
    window is there after going back by `rollback`. It is twice that long; when it is full, the part that is still
    needed moves to its front, once in window + rollback tokens.
    """

    is_sliding = True

    def __init__(self, capacity: int, window: int, rollback: int) -> None:
        super().__init__(min(capacity, 2 * (window + rollback)))
        self.window, self.needed = window, window - 1 + rollback
        self.first = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[-2] > 1:
            return self._absorb(key_states, value_states)
        if self.length - self.first == self.capacity:
            self._make_room()
        place = self.length - self.first
        self._store(place, key_states, value_states)
        self.length += 1
        assert self.keys is not None and self.values is not None
        seen = slice(max(0, place + 1 - self.window), place + 1)
        return self.keys[:, :, seen], self.values[:, :, seen]

    def _absorb(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """A piece of a prompt: it sees the window before it, the mask hides the rest; what is still needed stays."""
        assert self.keys is not None and self.values is not None
        place = self.length - self.first
        keys = torch.cat([self.keys[:, :, :place], key_states], dim=2)
        values = torch.cat([self.values[:, :, :place], value_states], dim=2)
        self.length += key_states.shape[-2]
        kept = min(keys.shape[2], self.needed, self.capacity)
        self.first = self.length - kept
        oldest = keys.shape[2] - kept
        self._store(0, keys[:, :, oldest:], values[:, :, oldest:])
        seen = max(0, place + 1 - self.window)
        return keys[:, :, seen:], values[:, :, seen:]

    def truncate(self, length: int) -> None:
        super().truncate(length)
        assert self.first == 0 or self.length - self.first >= self.window - 1, "rolled back further than agreed"

    def _store(self, start: int, key_states: Tensor, value_states: Tensor) -> None:
        assert self.keys is not None and self.values is not None
        stop = start + key_states.shape[-2]
        self.keys[:, :, start:stop] = key_states
        self.values[:, :, start:stop] = value_states

    def _make_room(self) -> None:
        moved = self.capacity - self.needed  # the two parts do not overlap: capacity >= 2 needed
        for buffer in (self.keys, self.values):
            assert buffer is not None
            buffer[:, :, : self.needed] = buffer[:, :, moved:]
        self.first += moved

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        hidden = max(self.length - self.window + 1, 0)
        return self.length - hidden + query_length, hidden

    def get_max_length(self) -> int:
        return self.window

    def reset(self) -> None:
        self.length = self.first = 0


class RecurrentLayer(LinearAttentionCacheLayerMixin):
    """The convolution's and the recurrent state after each of the last `rollback` + 1 tokens, in a ring.

    The states after p tokens lie in slot p modulo the ring's size. A piece of a prompt is absorbed at once and leaves
    one snapshot, its end; going back never reaches into it, because its tokens are true.
    """

    is_sliding = False

    def __init__(self, rollback: int) -> None:
        super().__init__()
        self.slots = rollback + 1
        self.length = 0
        self.oldest = 0  # the states after `oldest` .. `length` tokens are in the ring
        self._absorbing = 0
        self._conv: Tensor | None = None  # [slots, B, channels, kernel]
        self._recurrent: Tensor | None = None  # [slots, B, heads, key dim, value dim]

    def lazy_initialization(
        self, conv_states: Tensor | None = None, recurrent_states: Tensor | None = None, state_idx: int = 0
    ) -> None:
        if conv_states is not None:
            self._conv = conv_states.new_zeros(self.slots, *conv_states.shape)
        if recurrent_states is not None:
            self._recurrent = recurrent_states.new_zeros(self.slots, *recurrent_states.shape)

    @property
    def buffers(self) -> list[Tensor]:
        """Everything it holds; allocated by the first tokens, and never again."""
        return [buffer for buffer in (self._conv, self._recurrent) if buffer is not None]

    @property
    def conv_state(self) -> Tensor | None:
        """The convolution's state after `length` tokens."""
        return None if self._conv is None or not self.length else self._conv[self.length % self.slots]

    @property
    def recurrent_state(self) -> Tensor | None:
        """The recurrent state after `length` tokens."""
        return None if self._recurrent is None or not self.length else self._recurrent[self.length % self.slots]

    def next_conv_state(self) -> Tensor | None:
        """The state one token is about to update in place: a copy in the next slot, so that the old one stays."""
        state = self.conv_state
        if state is None or self._conv is None:
            return None
        self._absorbing = 1
        following = self._conv[(self.length + 1) % self.slots]
        return state if self.slots == 1 else following.copy_(state)

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: object
    ) -> Tensor:
        """A prompt's inputs of the convolution [B, channels, T]: the last `conv_kernel_size` of them are its state."""
        assert conv_kernel_size is not None, "several tokens at once are a prompt"
        self._absorbing = conv_states.shape[-1]
        if self.length:  # a later piece: the convolution reaches back into the one before
            padded = torch.cat([self._conv[self.length % self.slots], conv_states], dim=-1)  # type: ignore[index]
        else:
            padded = torch.nn.functional.pad(conv_states, (max(0, conv_kernel_size - self._absorbing), 0))
        last = padded[..., -conv_kernel_size:]
        if self._conv is None:
            self.lazy_initialization(conv_states=last)
        assert self._conv is not None
        self._conv[(self.length + self._absorbing) % self.slots] = last
        return padded

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: object) -> Tensor:
        if self._recurrent is None:
            self.lazy_initialization(recurrent_states=recurrent_states)
        assert self._recurrent is not None
        absorbed = self.length == 0 or self._absorbing > 1
        self.length += self._absorbing
        self.oldest = self.length if absorbed else max(self.oldest, self.length - self.slots + 1)
        self._recurrent[self.length % self.slots] = recurrent_states
        return self._recurrent[self.length % self.slots]

    def truncate(self, length: int) -> None:
        assert length >= self.oldest, "rolled back further than agreed"
        self.length = min(self.length, length)

    def reset(self) -> None:
        self.length = self.oldest = 0


RollbackLayer = FullAttentionLayer | RecurrentLayer


class RollbackCache(Cache):
    """One rollback layer per decoder layer; passed to transformers' layers as `past_key_values`."""

    def __init__(self, layers: Sequence[RollbackLayer]) -> None:
        self.rollback_layers: list[RollbackLayer] = list(layers)
        super().__init__(layers=list(layers))

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        layer = self.rollback_layers[layer_idx]
        assert isinstance(layer, RecurrentLayer)
        return layer.next_conv_state()

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        layer = self.rollback_layers[layer_idx]
        assert isinstance(layer, RecurrentLayer)
        return layer.recurrent_state

    def truncate(self, length: int) -> None:
        """Roll every layer back to the state after position length - 1; moves integers, no tensor."""
        for layer in self.rollback_layers:
            layer.truncate(length)


def rollback_layer(kind: str, capacity: int, rollback: int, window: int | None) -> RollbackLayer:
    """The cache of a layer of some kind (see `layer_kinds`) that may be rolled back by `rollback` tokens."""
    if kind == "linear_attention":
        return RecurrentLayer(rollback)
    if kind == "sliding_attention":
        assert window is not None
        return SlidingAttentionLayer(capacity, window, rollback)
    return FullAttentionLayer(capacity)
