"""The cache of a draft tree: a row is a node, wherever it lies, and a mask says whose keys a query sees.

Branches share the rows of what they have in common, and a branch that dies gives its rows back. Attention alone can do
this: a recurrent state is of one branch, and a sliding window counts positions by their place.

Shapes: K key/value heads, C rows that are there, D head_dim.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from spd_lightning.target.cache import FullAttentionLayer


class TreeLayer(FullAttentionLayer):
    """Keys and values [1, K, C, D] of one layer; tokens are written to the rows that the cache is told."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.places: Tensor | None = None
        self.used = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if self.places is None:  # the prompt, in its order
            return super().update(key_states, value_states)
        assert self.keys is not None and self.values is not None
        self.keys.index_copy_(2, self.places, key_states)
        self.values.index_copy_(2, self.places, value_states)
        return self.keys[:, :, : self.used], self.values[:, :, : self.used]


class TreeCache(Cache):
    """One `TreeLayer` per decoder layer; passed to transformers' layers as `past_key_values`."""

    def __init__(self, layers: int, capacity: int) -> None:
        self.tree_layers = [TreeLayer(capacity) for _ in range(layers)]
        super().__init__(layers=list(self.tree_layers))

    def write_to(self, places: Tensor, used: int) -> None:
        """Where the next tokens of every layer go, rows [R], and how many of the first rows they may see."""
        for layer in self.tree_layers:
            layer.places, layer.used = places, used

    def get_seq_length(self, layer_idx: int = 0, *args: Any, **kwargs: Any) -> int:
        return self.tree_layers[layer_idx].length
