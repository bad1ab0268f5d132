"""Which target a head was made for: names for people, digests for machines. Reads no weight."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from spd_lightning.errors import InputError

#: Entries of a config.json that change from one saving to the next and say nothing about the model.
_VOLATILE = (
    "architectures", "_name_or_path", "_commit_hash", "transformers_version", "torch_dtype", "dtype", "use_cache",
)  # fmt: skip


@dataclass(frozen=True)
class TargetIdentity:
    """What is known of the target that a head was made for; a field that is unknown is None.

    Attributes:
        source: hub id, `tiny`, or the name of a local folder (no path: it would mean nothing elsewhere).
        revision: hub revision, where one was asked for.
        commit: the hub's commit that was loaded.
        model_type: the family, as in the target's config.json.
        architecture: the class of the model, such as LlamaForCausalLM.
        dtype: of the published weights, such as bfloat16.
        config_digest: SHA-256 of config.json without what changes from one saving to the next.
        tokenizer_digest: SHA-256 of the tokens and their ids. Chat templates are not part of it: they change, and a
            head does not notice.
    """

    source: str | None = None
    revision: str | None = None
    commit: str | None = None
    model_type: str | None = None
    architecture: str | None = None
    dtype: str | None = None
    config_digest: str | None = None
    tokenizer_digest: str | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not isinstance(value, str):
                raise InputError(f"target.{name}={value!r}: expected text or null.")

    @classmethod
    def from_fields(cls, data: Any) -> TargetIdentity:
        """Of a mapping; InputError for anything else and for unknown names."""
        known = [field.name for field in fields(cls)]
        if not isinstance(data, dict) or set(data) - set(known):
            raise InputError(f"target={str(data)[:80]}: expected an object with some of {', '.join(known)}.")
        return cls(**data)


def identity_of(
    config: Any,
    source: str | None = None,
    revision: str | None = None,
    architecture: str | None = None,
    tokenizer: Any = None,
) -> TargetIdentity:
    """Of a Hugging Face configuration and, where there is one, a tokenizer.

    Args:
        architecture: the class of the model, for a configuration that names none.
    """
    text = config.get_text_config()
    dtype = getattr(text, "dtype", None) or getattr(config, "dtype", None)
    return TargetIdentity(
        source=source,
        revision=revision,
        commit=getattr(config, "_commit_hash", None),
        model_type=text.model_type,
        architecture=next(iter(getattr(config, "architectures", None) or []), architecture),
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        config_digest=_digest(_stable(json.loads(config.to_json_string()))),
        tokenizer_digest=None if tokenizer is None else tokenizer_digest(tokenizer),
    )


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's tokens and ids, added and special ones included."""
    return _digest(sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])))


def _stable(content: Any) -> Any:
    """A configuration, nested ones included, without what changes from one saving to the next."""
    if not isinstance(content, dict):
        return content
    return {name: _stable(value) for name, value in content.items() if name not in _VOLATILE}


def _digest(content: Any) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()
