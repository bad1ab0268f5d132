"""A conversation whose responses are written anew, turn by turn, and what the two kinds of writers have in common."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from spd_lightning.data.conversations import Conversation, Message
from spd_lightning.data.sources import digest
from spd_lightning.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; None is the default of the model or of the server.

    Args:
        temperature: 0 is greedy.
        top_p: the likeliest tokens of this mass.
        top_k: the likeliest tokens of this number.
        max_new_tokens: a response is cut here.
        seed: of the random numbers.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_new_tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise InputError(f"--temperature {self.temperature}: expected a number from 0 (greedy) on.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"--top-p {self.top_p}: expected a number above 0, at most 1.")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"--top-k {self.top_k}: expected at least 1.")
        if self.max_new_tokens < 1:
            raise InputError(f"--max-new-tokens {self.max_new_tokens}: expected at least 1.")

    def seed_of(self, what: object, turn: int) -> int:
        """The seed of one turn of one conversation or batch, below 2^31, which every engine takes."""
        return int(digest(str(self.seed), str(what), str(turn))[:8], 16) >> 1


@dataclass(frozen=True)
class Answer:
    """One response.

    Attributes:
        content: what the assistant says.
        finish_reason: stop; length where it was cut; or what a server says.
        response_tokens, prompt_tokens: as the writer counts them, the end-of-turn token included.
        thoughts: what it thought before, and the field of the message in which the template looks for it.
    """

    content: str
    finish_reason: str
    response_tokens: int
    prompt_tokens: int
    thoughts: tuple[str, str] | None = None

    def message(self) -> Message:
        told = {} if self.thoughts is None else {self.thoughts[0]: self.thoughts[1]}
        return {"role": "assistant", "content": self.content, **told}


def is_plain_answer(message: Message) -> bool:
    """Whether the target writes this turn; tool calls stay, since the results that follow belong to them."""
    return message["role"] == "assistant" and "tool_calls" not in message


class Dialogue:
    """A conversation on its way: the turns so far, in which every response is new.

    Attributes:
        number: its place in the input.
        given: the conversation as it came.
        messages: what the next turn answers.
        finish_reasons, response_tokens: of every response written.
        ended: why it ends before its time, None where it does not.
    """

    def __init__(self, number: int, given: Conversation) -> None:
        self.number, self.given = number, given
        self.messages: list[Message] = []
        self.finish_reasons: list[str] = []
        self.response_tokens: list[int] = []
        self.prompt_tokens = 0
        self.ended: str | None = None
        self._read = self._complete = 0
        self._advance()

    def _advance(self) -> None:
        """Take over what the target does not write, up to the next turn that it does."""
        turns = self.given.messages
        while self._read < len(turns) and not is_plain_answer(turns[self._read]):
            self.messages.append(turns[self._read])
            self._read += 1

    @property
    def is_open(self) -> bool:
        """Whether a turn is left to write."""
        return self.ended is None and self._read < len(self.given.messages)

    @property
    def turn(self) -> int:
        """The number of the turn that is written next."""
        return len(self.finish_reasons)

    def answer(self, answer: Answer) -> None:
        """The next turn; an empty one ends the dialogue before it."""
        self.prompt_tokens += answer.prompt_tokens
        if not answer.content.strip():
            return self.end("thoughts without an answer" if answer.thoughts else "empty response")
        self.messages.append(answer.message())
        self.finish_reasons.append(answer.finish_reason)
        self.response_tokens.append(answer.response_tokens)
        self._complete = len(self.messages)
        self._read += 1
        self._advance()

    def end(self, reason: str) -> None:
        """End with the last response that is complete."""
        self.ended = reason
        del self.messages[self._complete :]

    def record(self) -> dict[str, Any]:
        """What the journal keeps: the row (None where no response was written) and counts."""
        row = None
        if self.finish_reasons:
            row = replace(self.given, messages=tuple(self.messages)).as_row()
            row |= {"finish_reasons": self.finish_reasons, "response_tokens": self.response_tokens}
        return {"number": self.number, "row": row, "prompt_tokens": self.prompt_tokens, "ended": self.ended}


@dataclass(frozen=True)
class Unit:
    """Dialogues that are written together and recorded together."""

    number: int
    dialogues: list[Dialogue]


@dataclass
class Written:
    """A unit that is done, or why it failed."""

    unit: Unit
    failed: str | None = None
    retries: int = 0


class Writer(Protocol):
    """Whoever writes the responses.

    Attributes:
        facts: what the manifest says of it: model, effective sampling, versions.
    """

    facts: dict[str, Any]

    def write(self, units: Iterable[Unit], done: Callable[[Written], None]) -> None:
        """Writes all turns of all units and tells of each unit when it is complete.

        Raises:
            InputError: nothing more can be written.
        """


# -- thoughts --------------------------------------------------------------------------------------------------------

_CHANNEL = re.compile(r"<\|channel\|>(\w+)[^<]*<\|message\|>(.*?)(?=<\|end\|>|<\|return\|>|<\|channel\|>|$)", re.DOTALL)


@dataclass(frozen=True)
class Thoughts:
    """How a template tells thoughts from the answer; decides how a response is split to load straight back.

    Args:
        template: the chat template.
    """

    template: str
    in_channels: bool = field(init=False)
    in_tags: bool = field(init=False)

    def __post_init__(self) -> None:
        channels = "<|channel|>" in self.template and "thinking" in self.template
        object.__setattr__(self, "in_channels", channels)
        object.__setattr__(self, "in_tags", not channels and "reasoning_content" in self.template)

    def split(self, text: str, prompt: str) -> tuple[str, tuple[str, str] | None]:
        """The answer, and the thoughts with the name of their field.

        Args:
            text: the response; with control tokens where `in_channels`.
            prompt: what it answers: a template may open the thoughts itself.
        """
        if self.in_channels:
            parts = _CHANNEL.findall(text)
            answer = "".join(content for channel, content in parts if channel == "final")
            thoughts = "".join(content for channel, content in parts if channel == "analysis")
            return answer, ("thinking", thoughts) if thoughts else None
        begun = text.lstrip().startswith("<think>")
        if not self.in_tags or not (begun or prompt.rstrip().endswith("<think>")):
            return text, None
        inner, _, answer = (text.lstrip().removeprefix("<think>") if begun else text).partition("</think>")
        thoughts = inner.strip("\n")
        return answer.lstrip("\n"), ("reasoning_content", thoughts) if thoughts else None
