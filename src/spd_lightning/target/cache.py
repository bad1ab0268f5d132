"""A key/value cache that rolls back: one preallocated buffer per layer, truncated by moving its length.

Stage s of the pipeline runs s tokens behind stage 0, so every layer has its own length. A rejected draft removes the
tail of every layer (method: rollback); truncation costs nothing and the next token overwrites what was there. The
library's DynamicLayer concatenates, which copies the whole cache for each token and each layer.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class RollbackLayer(CacheLayerMixin):
    """Keys and values of one attention layer, [batch, kv_heads, capacity, head_dim], of which `length` are valid."""

    is_sliding = False
    is_croppable = True

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        def buffer(states: torch.Tensor) -> torch.Tensor:
            batch, heads, _, head_dim = states.shape
            return states.new_zeros(batch, heads, self.capacity, head_dim)

        self.keys, self.values = buffer(key_states), buffer(value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        start, self.length = self.length, self.length + key_states.shape[-2]
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def truncate(self, length: int) -> None:
        """Keep positions 0 .. length - 1; a layer that has not come that far keeps what it has."""
        self.length = min(self.length, length)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.capacity

    def reset(self) -> None:
        self.length = 0


class RollbackCache(Cache):
    """One `RollbackLayer` per decoder layer; passed to transformers' layers as `past_key_values`."""

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.rollback_layers = [RollbackLayer(capacity) for _ in range(num_layers)]
        super().__init__(layers=list(self.rollback_layers))

    def truncate(self, length: int) -> None:
        """Roll every layer back to the state after position length - 1."""
        for layer in self.rollback_layers:
            layer.truncate(length)
