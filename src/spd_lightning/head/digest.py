"""The digest of a head's weights: which very numbers something was measured with, whatever file they lie in."""

from __future__ import annotations

import hashlib

import torch

from spd_lightning.head.folder import FLOATS
from spd_lightning.head.module import SpeculationHead


def weights_digest(head: SpeculationHead, dtype: torch.dtype | None = None) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor, in the order of names.

    Args:
        dtype: as if the head had been cast to it; default: as it is.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(head.state_dict().items()):
        cast = tensor.detach().cpu().to(dtype or tensor.dtype).contiguous()
        digest.update(f"{name} {cast.dtype} {list(cast.shape)}\n".encode())
        digest.update(cast.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def matches(head: SpeculationHead, digest: str) -> bool:
    """Whether the digest is that of the head, as it is stored or cast to another type of float."""
    return any(weights_digest(head, dtype) == digest for dtype in (None, *FLOATS))
