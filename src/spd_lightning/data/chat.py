"""From a conversation to tokens and assistant turns, by the tokenizer's own chat template.

The rule: **a turn is labelled where the tokens stand as the target meets them when it answers.** Two ways to find them:

- Templates with generation tags say themselves what the assistant writes.
- Otherwise each turn is located by rendering. Up to the turn, with a generation prompt, the conversation must be a
  prefix of the rendering that ends with the turn; what follows is what the target has to write, its end-of-turn token
  included (and what the template makes it write before the answer: gpt-oss's channel, an empty block of thoughts).
  Many templates write an older turn in another way than the last one (Qwen3 leaves its thoughts out, gpt-oss ends it
  differently). No target answers in that form, so such a conversation becomes several samples, each of which ends with
  a turn as it is answered; turns that agree share a sample. A template for which the prefix does not hold is refused;
  nothing is guessed from separators.

The proof is made on the tokens: those before a turn are exactly those of its prompt by itself, and none reaches across
its end. Where one would (a prompt that ends with a newline and an answer that begins with one), the turn becomes a
sample of its own, prompt and answer tokenised apart, as at inference; in the prompts of later turns they are joined.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np

from spd_lightning.data.conversations import Conversation
from spd_lightning.data.tally import BadRowError
from spd_lightning.errors import InputError, first_line

#: Tokens of a plain text that a decoder is given as its prompt.
TEXT_PROMPT = 32
_TAGS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_TODAY = re.compile(r"\bstrftime_now\(\s*(['\"])(.*?)\1\s*\)")


@dataclass(frozen=True)
class ChatOptions:
    """How conversations are rendered.

    Args:
        template: file with another chat template than the tokenizer's own.
        arguments: what the template is given besides messages, such as enable_thinking: false (Qwen3, Qwen3.5) or
            reasoning_effort: low (gpt-oss).
        date: today's date for templates that write it (gpt-oss, Llama 3.2): a fixed one, so that runs repeat.
        turns: all assistant turns are learned from, or the last of each conversation.
    """

    template: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    date: str = "2025-01-01"
    turns: Literal["all", "last"] = "all"

    def __post_init__(self) -> None:
        try:
            date.fromisoformat(self.date)
        except ValueError as error:
            raise InputError(f"data.chat.date={self.date!r}: expected a date such as 2025-01-01.") from error
        if self.template is not None and not Path(self.template).is_file():
            raise InputError(
                f"data.chat.template={self.template!r} does not exist: expected a file with a Jinja template."
            )


@dataclass(frozen=True, eq=False)
class Sample:
    """One tokenised conversation, or the part of one that ends with a certain turn.

    Attributes:
        index: its number in the corpus, which seeds its restarts.
        ids: [S] int32 token ids.
        turns: [first, last + 1) positions that the assistant writes, in order; the end-of-turn token included.
    """

    index: int
    ids: np.ndarray
    turns: tuple[tuple[int, int], ...]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sample) or (self.index, self.turns) != (other.index, other.turns):
            return False
        return np.array_equal(self.ids, other.ids)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def labelled(self) -> np.ndarray:
        """[S] bool: whether the assistant wrote the token."""
        flags = np.zeros(len(self.ids), bool)
        for start, stop in self.turns:
            flags[start:stop] = True
        return flags

    @property
    def labels(self) -> int:
        """Number of labelled tokens."""
        return sum(stop - start for start, stop in self.turns)

    @property
    def drafted(self) -> int:
        """Number of labelled tokens that a head drafts: all but the first of each turn."""
        return self.labels - len(self.turns)

    @property
    def prompt(self) -> list[int]:
        """What a decoder is given: everything before the first turn, or the beginning of a plain text."""
        first = self.turns[0][0] if self.turns else 0
        return self.ids[: first or TEXT_PROMPT].tolist()


@dataclass(frozen=True)
class _Text:
    """A rendering and the characters [start, stop) of the turns that are labelled in it."""

    text: str
    spans: tuple[tuple[int, int], ...]


class ChatEncoder:
    """Applies a chat template.

    Args:
        tokenizer: a fast Hugging Face tokenizer; with a chat template, unless only plain texts are encoded.
        max_length: tokens after which a conversation is cut; plain texts go on in further samples.
        options: how conversations are rendered.
    """

    def __init__(self, tokenizer: Any, max_length: int, options: ChatOptions = ChatOptions()) -> None:  # noqa: B008
        self.tokenizer, self.max_length, self.options = tokenizer, max_length, options
        own = getattr(tokenizer, "chat_template", None)
        self.template = own if options.template is None else _read_template(Path(options.template))
        if isinstance(self.template, Mapping):  # several, by name
            self.template = self.template.get("default")
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(f"The tokenizer {tokenizer.name_or_path!r} is a slow one: expected a tokenizer.json.")
        if self.template:
            self.template = _dated(self.template, date.fromisoformat(options.date))
        self.has_tags = bool(self.template and _TAGS.search(self.template))
        self.added = set(tokenizer.added_tokens_decoder)
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special = special | set(tokenizer.all_special_ids)
        self._known: dict[str, list[int]] = {}

    def __call__(self, messages: Sequence[Mapping[str, Any]], index: int = 0) -> list[Sample]:
        """The samples of one conversation; their numbers start at `index`."""
        made = self.encode([Conversation("", tuple(map(dict, messages)))])[0]
        if isinstance(made, BadRowError):
            raise made
        return [Sample(index + number, sample.ids, sample.turns) for number, sample in enumerate(made)]

    def encode(self, conversations: Sequence[Conversation]) -> list[list[Sample] | BadRowError]:
        """Samples of many conversations, tokenised together; a conversation that cannot be rendered gives its fault.

        Samples are numbered within their conversation. One without a labelled token is left out; a conversation
        without any is a fault.
        """
        rendered = [self._rendered(conversation) for conversation in conversations]
        texts = [text for found in rendered if not isinstance(found, BadRowError) for text in found]
        encoded = iter(self._samples(texts))
        result: list[list[Sample] | BadRowError] = []
        for conversation, found in zip(conversations, rendered, strict=True):
            if isinstance(found, BadRowError):
                result.append(found)
                continue
            samples: list[Sample] = []
            fault = None
            for made in [next(encoded) for _ in found]:
                if isinstance(made, BadRowError):
                    fault = fault or made
                else:
                    samples += made
            result.append(fault or self._cut(samples, conversation))
        return result

    def prompt_text(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()) -> str:
        """The rendering that asks for the next assistant turn."""
        return self._render(messages, tools, prompt=True)

    # -- rendering ---------------------------------------------------------------------------------------------------

    def _rendered(self, conversation: Conversation) -> list[_Text] | BadRowError:
        try:
            if conversation.text is not None:
                return [_Text(conversation.text, ((0, len(conversation.text)),))]
            if not self.template:
                raise InputError(
                    f"The tokenizer {self.tokenizer.name_or_path!r} has no chat template: expected that of an instruct "
                    "model, or plain texts. Set data.chat.template to a file with one."
                )
            texts = self._tagged(conversation) if self.has_tags else self._by_prefixes(conversation)
        except BadRowError as error:
            return error
        except InputError:
            raise
        except Exception as error:  # a template raises whatever jinja2 and Python raise
            return BadRowError("the chat template raises", f"{type(error).__name__}: {first_line(error)}")
        if self.options.turns == "last":
            texts = [_Text(texts[-1].text, texts[-1].spans[-1:])]
        return texts

    def _tagged(self, conversation: Conversation) -> list[_Text]:
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any = render_jinja_template(
            [_reasoned(conversation.messages)],
            tools=list(conversation.tools) or None,
            chat_template=self.template,
            return_assistant_tokens_mask=True,
            **self._variables(),
        )
        (text,), (spans,) = rendered
        return [_Text(text, tuple((start, stop) for start, stop in spans if stop > start))]

    def _by_prefixes(self, conversation: Conversation) -> list[_Text]:
        messages, tools = conversation.messages, conversation.tools
        numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if self.options.turns == "last":
            numbers = numbers[-1:]
        turns = []
        for number in numbers:
            before = self._render(messages[:number], tools, prompt=True)
            through = self._render(messages[: number + 1], tools)
            if not through.startswith(before):
                raise BadRowError(
                    "the chat template answers otherwise than it asks",
                    f"message {number}: what it renders is no continuation of its own generation prompt; "
                    "set data.chat.template to a variant with {% generation %} tags",
                )
            turns.append((through, (len(before), len(through))))
        samples: list[_Text] = []
        for through, span in reversed(turns):  # the last turn is always as it is answered
            if samples and samples[-1].text.startswith(through):
                samples[-1] = _Text(samples[-1].text, (span, *samples[-1].spans))
            else:
                samples.append(_Text(through, (span,)))
        return samples[::-1]

    def _render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any], prompt: bool = False) -> str:
        rendered = self.tokenizer.apply_chat_template(
            _reasoned(messages),
            tools=list(tools) or None,
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=prompt,
            **self.options.arguments,
        )
        return str(rendered)

    def _variables(self) -> dict[str, Any]:
        special = {k: str(v) for k, v in self.tokenizer.special_tokens_map.items()}
        return {**special, **self.options.arguments}

    # -- tokens ------------------------------------------------------------------------------------------------------

    def _samples(self, texts: Sequence[_Text]) -> list[list[Sample] | BadRowError]:
        """The samples of each text."""
        encoded = self._tokenise([each.text for each in texts])
        result: list[list[Sample] | BadRowError] = []
        for text, (ids, offsets) in zip(texts, encoded, strict=True):
            try:
                result.append(self._split(text, ids, offsets))
            except BadRowError as error:
                result.append(error)
        return result

    def _tokenise(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per text the ids [S] and the characters [S, 2] they stand for."""
        if not texts:
            return []
        batch = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [
            (np.array(ids, np.int32), np.array(offsets, np.int64).reshape(-1, 2))
            for ids, offsets in zip(batch["input_ids"], batch["offset_mapping"], strict=True)
        ]

    def _split(self, text: _Text, ids: np.ndarray, offsets: np.ndarray) -> list[Sample]:
        """One sample for the turns that can share it, and one for each turn that must stand apart."""
        apart, turns = [], []
        for start, stop in text.spans:
            # offsets may run backwards where one character is several tokens, but starts never do
            first, last = map(int, np.searchsorted(offsets[:, 0], [start, stop]))
            anchor, asked = self._asked(text.text[:start], ids, offsets, first)
            if ids[anchor:first].tolist() == asked and (last == 0 or offsets[last - 1, 1] <= stop):
                turns.append((first, self._end(ids, offsets, text.text, first, last)))
            else:
                upto = text.text[:stop]
                encoded = (ids, offsets) if upto == text.text else self._tokenise([upto])[0]
                apart.append(self._apart(upto, start, *encoded))
        if together := tuple((first, last) for first, last in turns if last > first):
            apart.append(Sample(0, ids[: together[-1][1]] if apart else ids, together))
        return sorted(apart, key=lambda sample: sample.turns)

    def _asked(self, prompt: str, ids: np.ndarray, offsets: np.ndarray, first: int) -> tuple[int, list[int]]:
        """The position of the last added token of a prompt of about `first` tokens, and the ids from there on.

        They are tokenised without what follows. What stands before an added token does not depend on what follows it.
        """
        anchor = first
        while anchor and not (int(ids[anchor - 1]) in self.added and offsets[anchor - 1, 1] <= len(prompt)):
            anchor -= 1
        anchor = max(anchor - 1, 0)
        tail = prompt[offsets[anchor, 0] :] if anchor else prompt
        if tail not in self._known:  # mostly the header of an answer, the same for all conversations
            if len(self._known) >= 1000:
                self._known.clear()
            self._known[tail] = self.tokenizer(tail, add_special_tokens=False, verbose=False)["input_ids"]
        return anchor, self._known[tail]

    def _apart(self, text: str, start: int, ids: np.ndarray, offsets: np.ndarray) -> Sample:
        """The sample of a text that ends with a turn, prompt and answer tokenised by themselves."""
        anchor, asked = self._asked(text[:start], ids, offsets, int(np.searchsorted(offsets[:, 0], start)))
        answer, places = self._tokenise([text[start:]])[0]
        joined = np.concatenate([np.array(asked, np.int32), answer])
        if self._decode(joined) != self._decode(ids[anchor:]):  # some tokenizers begin every text with a blank
            raise BadRowError("a token reaches across the border of a turn", f"character {start}")
        first = anchor + len(asked)
        last = first + self._end(answer, places, text[start:], 0, len(answer))
        return Sample(0, np.concatenate([ids[:anchor], joined]), ((first, last),))

    def _end(self, ids: np.ndarray, offsets: np.ndarray, text: str, first: int, last: int) -> int:
        """One past the end-of-turn token: blanks that a template writes after it are not the assistant's."""
        for position in range(last - 1, first - 1, -1):
            if int(ids[position]) in self.special:
                return position + 1
            if text[offsets[position, 0] : offsets[position, 1]].strip():
                break
        return last

    def _decode(self, ids: np.ndarray) -> str:
        return str(self.tokenizer.backend_tokenizer.decode(ids.tolist(), skip_special_tokens=False))

    def _cut(self, samples: list[Sample], conversation: Conversation) -> list[Sample] | BadRowError:
        most, kept = self.max_length, []
        for sample in samples:
            if conversation.text is not None:
                pieces = [sample.ids[start : start + most] for start in range(0, len(sample), most)]
                # a piece of one token has nothing to predict
                kept += [Sample(0, piece, ((0, len(piece)),)) for piece in pieces if len(piece) > 1]
                continue
            turns = tuple((start, min(stop, most)) for start, stop in sample.turns if start < most)
            if turns:
                kept.append(Sample(0, sample.ids[:most], turns))
        if not kept:
            return BadRowError("no labelled token", f"within {most} tokens, of {max(map(len, samples), default=0)}")
        return [Sample(number, sample.ids, sample.turns) for number, sample in enumerate(kept)]


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"data.chat.template={str(path)!r} cannot be read: {first_line(error)}.") from error


def _dated(template: str, today: date) -> str:
    """The template with a fixed date in place of today's; what is passed to it could not replace the function."""
    fixed = _TODAY.sub(lambda call: repr(today.strftime(call[2])), template)
    if re.search(r"\bstrftime_now\s*\(", fixed):
        raise InputError(
            "The chat template writes today's date in a form that is not fixed: expected strftime_now with a literal "
            "such as strftime_now('%Y-%m-%d'). Set data.chat.template to a file where it is."
        )
    return fixed


def _reasoned(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Thoughts under both names that templates know; only newer versions of transformers see to that themselves."""
    result = []
    for message in messages:
        thoughts = message.get("reasoning_content", message.get("thinking"))
        names = {} if thoughts is None else {"reasoning_content": thoughts, "thinking": thoughts}
        result.append({**message, **names})
    return result
