"""From a conversation to tokens, assistant labels and turn starts, by the tokenizer's own chat template.

Labels come from the template's generation tags where it has them. Otherwise each assistant turn is located by
rendering: the conversation up to the turn with a generation prompt must be a prefix of the rendering with it, and what
follows is the turn. A template for which that does not hold is refused; nothing is guessed from separators.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spd_lightning.errors import InputError

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Sample:
    """One tokenised conversation.

    Attributes:
        index: its number in the source, which seeds its restarts.
        ids: token ids.
        labelled: per token, whether the assistant wrote it (the end-of-turn token included).
        turn_starts: positions of the first token of every assistant turn.
    """

    index: int
    ids: tuple[int, ...]
    labelled: tuple[bool, ...]
    turn_starts: tuple[int, ...]

    @property
    def prompt(self) -> list[int]:
        """Everything before the first assistant turn: what a decoder is given. Empty without a turn."""
        return list(self.ids[: self.turn_starts[0]]) if self.turn_starts else []


class ChatEncoder:
    """Applies a chat template.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        max_length: tokens after which a conversation is cut.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                f"The tokenizer {tokenizer.name_or_path!r} has no chat template: expected that of an instruct model."
            )
        self.tokenizer, self.max_length = tokenizer, max_length
        self.has_tags = "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template

    def __call__(self, messages: Sequence[Message], index: int) -> Sample:
        ids, labelled = self._tagged(messages) if self.has_tags else self._by_prefixes(messages)
        ids, labelled = ids[: self.max_length], labelled[: self.max_length]
        starts = [i for i, mine in enumerate(labelled) if mine and (i == 0 or not labelled[i - 1])]
        return Sample(index, tuple(ids), tuple(labelled), tuple(starts))

    def _tagged(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        encoded = self.tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(encoded["input_ids"]), [bool(flag) for flag in encoded["assistant_masks"]]

    def _by_prefixes(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        text = self._render(messages)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:number], prompt=True)
            through = self._render(messages[: number + 1])
            if not through.startswith(before) or not text.startswith(through):
                raise InputError(
                    "This chat template does not render a conversation as a prefix of its continuation, so assistant "
                    "turns cannot be located. Use a template with {% generation %} tags."
                )
            spans.append((len(before), len(through)))
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
        labelled = [False] * len(ids)
        special = set(self.tokenizer.all_special_ids)
        for a, b in spans:
            turn = [i for i, (start, stop) in enumerate(offsets) if a <= start and stop <= b]
            # what a template writes after the end-of-turn token (a newline, say) is not the assistant's
            ends = [i for i in turn if ids[i] in special]
            for i in turn:
                labelled[i] = not ends or i <= ends[-1]
        return ids, labelled

    def _render(self, messages: Sequence[Message], prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
