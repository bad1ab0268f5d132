"""A tiny run on disk: a random target with a tokenizer and a chat template, and conversations as JSON lines."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

Conversation = list[dict[str, str]]

SPECIAL = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>", "<|system|>"]
#: The template with generation tags; without the tags it renders the same text.
TAGGED = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' }}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
WORDS = ["the", "a", "file", "opens", "path", "reads", "line", "returns", "value", "of", "in", "to", "module", "list"]


def _conversations(count: int, seed: int, turns: Sequence[int] = (1, 2), words: int = 12) -> list[Conversation]:
    """Random conversations of one or two rounds, some with a system message."""
    draw = random.Random(seed)

    def text(least: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, words)))

    made = []
    for _ in range(count):
        messages = [{"role": "system", "content": text(1)}] if draw.random() < 0.3 else []
        for _ in range(draw.choice(list(turns))):
            messages += [{"role": "user", "content": text(2)}, {"role": "assistant", "content": text(4)}]
        made.append(messages)
    return made


def _write_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _build_tokenizer(chat_template: str | None = TAGGED, vocab: int = 300) -> Any:
    """A byte-level BPE tokenizer, so that any text survives, with a few merges and the special tokens in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="session")
def make_conversations() -> Callable[..., list[Conversation]]:
    """The factory of random conversations, see `_conversations`."""
    return _conversations


@pytest.fixture(scope="session")
def write_lines() -> Callable[[Path, Iterable[Any]], Path]:
    """Writes rows as JSON lines and returns the path."""
    return _write_lines


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """The factory of tiny tokenizers, see `_build_tokenizer`."""
    return _build_tokenizer


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory, make_target: Callable[..., Any]) -> Callable[..., Path]:
    """Writes a tiny random llama with its tokenizer to a folder; arguments as in `make_target`."""

    def make(change: Callable[[Any], None] | None = None, **options: Any) -> Path:
        folder = tmp_path_factory.mktemp("target")
        tokenizer = _build_tokenizer()
        settings: dict[str, Any] = {"num_layers": 4, "vocab": len(tokenizer), "eos_token_id": SPECIAL.index("<|end|>")}
        model = make_target(**(settings | options)).model
        if change is not None:
            change(model)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def model_folder(make_model: Callable[..., Path]) -> Path:
    """A target of 4 layers whose argmaxes vary; an untrained head is right now and then."""
    return make_model(spread=0.06, embedding_scale=3.0)


@pytest.fixture(scope="session")
def data_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """40 training and 14 held-out conversations."""
    folder = tmp_path_factory.mktemp("data")
    return {
        "train": str(_write_lines(folder / "train.jsonl", ({"messages": m} for m in _conversations(40, 0)))),
        "validation": str(_write_lines(folder / "validation.jsonl", ({"messages": m} for m in _conversations(14, 1)))),
    }
