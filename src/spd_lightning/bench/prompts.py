"""Prompts for measurements: Spec-Bench and MT-Bench, GSM8K, HumanEval, chats, plain text."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from spd_lightning.errors import InputError


@dataclass(frozen=True)
class Prompt:
    """One conversation to answer.

    Attributes:
        key: unique in its set: the question's id, or its line.
        category: as the file says, else None.
        turns: what the user says, one after another.
        before: messages that come before the first turn (a chat's earlier rounds, a system message).
    """

    key: str
    category: str | None
    turns: tuple[str, ...]
    before: tuple[tuple[str, str], ...] = ()

    def seed(self, seed: int) -> int:
        """Of its draws: the prompt's own, so that no other prompt of a set changes its result."""
        return int.from_bytes(sha256(f"{seed} {self.before} {self.turns}".encode()).digest()[:7], "big")


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one file: `name`, `format`, SHA-256 of the file, how many it holds, and those that are used."""

    name: str
    format: str
    sha256: str
    available: int
    prompts: tuple[Prompt, ...]
    too_long: tuple[str, ...] = ()

    def select(self, fits: Callable[[Prompt], bool], limit: int | None) -> PromptSet:
        """Those that fit the target's context, and of them `limit`, see `spread`; `too_long` keeps the others' keys.

        Raises:
            InputError: none fits.
        """
        fitting = [prompt for prompt in self.prompts if fits(prompt)]
        if not fitting:
            raise InputError(f"--prompts {self.name}: no prompt fits the target's context. Lower --max-new-tokens.")
        kept = {prompt.key for prompt in fitting}
        chosen = fitting if limit is None or limit >= len(fitting) else spread(fitting, limit)
        too_long = tuple(prompt.key for prompt in self.prompts if prompt.key not in kept)
        return replace(self, prompts=tuple(chosen), too_long=too_long)


def read_prompts(path: Path) -> PromptSet:
    """The prompts of a file, whose format is seen by its fields.

    Args:
        path: JSON lines with `turns` (Spec-Bench, MT-Bench), `question` (GSM8K), `prompt` (HumanEval) or `messages` /
            `conversations` (chats, up to the last turn of the user); a file of any other name than *.jsonl or *.json
            is text, one prompt per line.

    Raises:
        InputError: naming file and line.
    """
    try:
        data = path.read_bytes()
        lines = data.decode("utf-8-sig").split("\n")  # U+2028 and form feeds belong to the text
    except (OSError, ValueError) as error:
        raise InputError(f"--prompts {path} cannot be read: {error}") from error
    texts = path.suffix not in (".jsonl", ".json")
    prompts, formats = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if texts:
            found, form = Prompt(f"line {number}", None, (line.strip(),)), "text"
        else:
            found, form = _parse(line, number, path)
        prompts.append(found)
        formats.append(form)
    if not prompts:
        raise InputError(f"--prompts {path} holds no prompt.")
    keys = [prompt.key for prompt in prompts]
    if len(set(keys)) < len(keys):  # ids of several files in one: the line tells them apart
        prompts = [Prompt(f"{i}:{p.key}", p.category, p.turns, p.before) for i, p in enumerate(prompts, start=1)]
    return PromptSet(
        _name(path), " and ".join(sorted(set(formats))), sha256(data).hexdigest(), len(prompts), tuple(prompts)
    )


def _name(path: Path) -> str:
    """Of the set; what many sets are called alike is told apart by its folder."""
    return f"{path.resolve().parent.name}/{path.stem}" if path.stem in _COMMON else path.stem


_COMMON = ("question", "questions", "test", "train", "prompts", "data", "validation")


def spread(prompts: Sequence[Prompt], limit: int) -> list[Prompt]:
    """`limit` prompts in their order: categories in turn, evenly spaced within each."""
    places: dict[str | None, list[int]] = defaultdict(list)
    for place, prompt in enumerate(prompts):
        places[prompt.category].append(place)
    quota = dict.fromkeys(places, 0)
    left = limit
    while left:
        for category, members in places.items():
            if left and quota[category] < len(members):
                quota[category] += 1
                left -= 1
    chosen = [
        members[(2 * i + 1) * len(members) // (2 * quota[category])]
        for category, members in places.items()
        for i in range(quota[category])
    ]
    return [prompts[place] for place in sorted(chosen)]


def _parse(line: str, number: int, path: Path) -> tuple[Prompt, str]:
    where = f"--prompts {path}, line {number}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is no JSON: {error}") from error
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: expected a JSON object, found {type(row).__name__}.")
    category = row.get("category")
    key = row.get("question_id", row.get("task_id", row.get("id", f"line {number}")))
    made = (str(key), None if category is None else str(category))
    if isinstance(row.get("turns"), list) and row["turns"] and all(_is_text(turn) for turn in row["turns"]):
        return Prompt(*made, tuple(row["turns"])), "Spec-Bench"
    if _is_text(row.get("question")):
        return Prompt(*made, (row["question"],)), "GSM8K"
    if _is_text(row.get("prompt")):
        return Prompt(*made, (row["prompt"],)), "HumanEval"
    if isinstance(chat := row.get("messages") or row.get("conversations"), list):
        return _chat(chat, made, where), "chat"
    raise InputError(
        f"{where}: expected a field turns (Spec-Bench, MT-Bench), question (GSM8K), prompt (HumanEval), messages or "
        f"conversations, found {sorted(map(str, row))[:8]}."
    )


_ROLES = {"human": "user", "gpt": "assistant"}


def _chat(chat: Sequence[Any], made: tuple[str, str | None], where: str) -> Prompt:
    messages = []
    for message in chat:
        fields = message if isinstance(message, Mapping) else {}
        role, text = fields.get("role", fields.get("from")), fields.get("content", fields.get("value"))
        if not _is_text(text) or not isinstance(role, str):
            raise InputError(f"{where}: expected messages with role and content (or from and value).")
        messages.append((_ROLES.get(role, role), str(text)))
    while messages and messages[-1][0] != "user":
        messages.pop()
    if not messages:
        raise InputError(f"{where}: the user says nothing.")
    return Prompt(*made, (messages[-1][1],), tuple(messages[:-1]))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
