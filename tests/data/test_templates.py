"""The chat templates of well-known models: what is learned from is what the model is asked for, token by token.

templates/<name>.txt are tables to read, renewed by `SPD_RENEW=1 pytest tests/data/test_templates.py`: a line says `.`
for tokens of the prompt, `F` for the first token of a turn and `x` for its further ones, how many tokens, and their
text. The templates are the copies that trl keeps; Mistral's, without its tools, is templates/mistral_v3.jinja.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spd_lightning.data.chat import ChatEncoder, ChatOptions, Sample
from spd_lightning.data.tally import BadRowError

Messages = list[dict[str, str]]

TABLES = Path(__file__).parent / "templates"
TODAY = date(2025, 1, 1)
BLANK_THOUGHTS = "<think>\n\n</think>\n\n"
#: The pattern by which Llama 3 and Qwen cut text; newlines in a row become one piece.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Family:
    """A template with the tokens it is made of.

    Attributes:
        template: its file, of trl or beside the tables.
        special: special tokens, the end of turn last.
        answer: what the target has to write, of the content and the thoughts.
        bos: bos_token.
        plain: added tokens that are not special.
        arguments: what the template is given.
        system: whether it takes system messages.
        thoughts: whether it writes thoughts.
        header: how much more of the end of a prompt trl's generation tags take in.
    """

    template: str
    special: tuple[str, ...]
    answer: Callable[[str, str], str]
    bos: str | None = None
    plain: tuple[str, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)
    system: bool = True
    thoughts: bool = False
    header: str | None = ""


LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
THINK = ("<think>", "</think>")


def llama(content: str, thoughts: str) -> str:
    return content.strip() + "<|eot_id|>"


def qwen(content: str, thoughts: str) -> str:
    return content + "<|im_end|>"


def gemma(content: str, thoughts: str) -> str:
    return content.strip() + "<end_of_turn>"


def gptoss(content: str, thoughts: str) -> str:
    before = f"<|channel|>analysis<|message|>{thoughts}<|end|><|start|>assistant" if thoughts else ""
    return f"{before}<|channel|>final<|message|>{content}<|return|>"


FAMILIES = {
    "llama3": Family("llama3", LLAMA, llama, LLAMA[0]),
    # trl has no tagged variant of these two
    "llama3_1": Family("llama3_1", LLAMA, llama, LLAMA[0], header=None),
    "llama3_2": Family("llama3_2", LLAMA, llama, LLAMA[0], header=None),
    "qwen2_5": Family("qwen2_5", QWEN, qwen, header="\n"),
    "qwen3": Family(
        "qwen3",
        QWEN,
        lambda content, thoughts: (
            "<think>\n" + thoughts.strip("\n") + "\n</think>\n\n" + content.lstrip("\n") + "<|im_end|>"
        ),
        plain=THINK,
        arguments={"enable_thinking": True},
        thoughts=True,
    ),
    "qwen3_no_thinking": Family(
        "qwen3",
        QWEN,
        lambda content, thoughts: content.lstrip("\n") + "<|im_end|>",
        plain=THINK,
        arguments={"enable_thinking": False},
        header=BLANK_THOUGHTS,
    ),
    "qwen3_instruct_2507": Family("qwen3_instruct_2507", QWEN, qwen),
    "qwen3_5_think": Family(
        "qwen3_5_think",
        QWEN,
        lambda content, thoughts: thoughts.strip() + "\n</think>\n\n" + content.strip() + "<|im_end|>",
        plain=THINK,
        thoughts=True,
        header="<think>\n",
    ),
    "qwen3_5_nothink": Family(
        "qwen3_5_nothink",
        QWEN,
        lambda content, thoughts: content.strip() + "<|im_end|>",
        plain=THINK,
        header=BLANK_THOUGHTS,
    ),
    "mistral_v3": Family(
        "mistral_v3",
        ("<s>", "[INST]", "[/INST]", "</s>"),
        lambda content, thoughts: f" {content.strip()}</s>",
        "<s>",
        system=False,
        header=None,
    ),
    "gemma": Family("gemma", GEMMA, gemma, "<bos>", system=False),
    "gemma3": Family("gemma3", GEMMA, gemma, "<bos>"),
    "gptoss": Family(
        "gptoss",
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
        gptoss,
        thoughts=True,
        header="<|start|>assistant",
    ),
}
#: These write an answer in another way once a question follows, so that each turn is a sample of its own.
REWRITTEN = {"qwen3", "qwen3_no_thinking", "qwen3_5_think", "qwen3_5_nothink", "gptoss"}
every_family = pytest.mark.parametrize("name", FAMILIES)


@cache
def template_of(name: str) -> str:
    local = TABLES / f"{name}.jinja"
    if local.is_file():
        return local.read_text(encoding="utf-8")
    trl = importlib.util.find_spec("trl")
    if trl is None or trl.origin is None:
        pytest.skip("trl is not installed")
    return (Path(trl.origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@cache
def tokenizer_of(special: tuple[str, ...], plain: tuple[str, ...], bos: str | None) -> Any:
    """Byte-level with a few merges, newlines among them."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AddedToken, PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator(
        ["the file reads a line\n\n of\n\n\nthe system user assistant model  path\n"] * 20, trainer
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=bos, eos_token=special[-1])
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special], special_tokens=True)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    return tokenizer


@cache
def encoder_of(name: str, variant: str = "", turns: Any = "all") -> ChatEncoder:
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family.special, family.plain, family.bos)
    tokenizer.chat_template = template_of(family.template + variant)
    return ChatEncoder(tokenizer, 100_000, ChatOptions(arguments=family.arguments, turns=turns))


def rendered(name: str, messages: Messages, prompt: bool = False) -> str:
    """By Jinja alone, as inference servers do it."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    family = FAMILIES[name]
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    names = {"bos_token": family.bos, "eos_token": family.special[-1], "strftime_now": TODAY.strftime}
    return environment.from_string(template_of(family.template)).render(
        messages=messages, add_generation_prompt=prompt, **{**names, **family.arguments}
    )


def text_of(encoder: ChatEncoder, ids: Sequence[int]) -> str:
    return str(encoder.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def turns_of(encoder: ChatEncoder, samples: list[Sample]) -> list[tuple[list[int], str]]:
    """The ids before every turn and the text of the turn, shorter prompts first."""
    found = [
        (sample.ids[:start].tolist(), text_of(encoder, sample.ids[start:stop]))
        for sample in samples
        for start, stop in sample.turns
    ]
    return sorted(found, key=lambda turn: len(turn[0]))


# -- tables ----------------------------------------------------------------------------------------------------------

SHORT: Messages = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "Say \u201chello\u201d in code. "},
    {"role": "assistant", "content": "\n\n    print('{{ hello }}') \U0001f469\u200d\U0001f4bb\n"},
]
THOUGHTS = {"It is 4.": "Two and two.", SHORT[-1]["content"]: "Python will do.\n"}


def conversation_of(name: str, thoughts: bool = False) -> Messages:
    messages = SHORT if FAMILIES[name].system else SHORT[1:]
    if not thoughts:
        return messages
    return [{**m, "reasoning_content": THOUGHTS[m["content"]]} if m["role"] == "assistant" else m for m in messages]


def table(encoder: ChatEncoder, title: str, samples: list[Sample]) -> list[str]:
    lines = []
    for number, sample in enumerate(samples, 1):
        lines.append(f"== {title}, sample {number} of {len(samples)}: {len(sample)} tokens")
        marks = ["x" if mine else "." for mine in sample.labelled]
        for start, _ in sample.turns:
            marks[start] = "F"
        # an added token has a line of its own
        kinds = [
            (m, i if int(t) in encoder.added or m == "F" else -1)
            for i, (m, t) in enumerate(zip(marks, sample.ids, strict=True))
        ]
        at = 0
        for (mark, _), run in groupby(kinds):
            count = len(list(run))
            text = json.dumps(text_of(encoder, sample.ids[at : at + count]), ensure_ascii=False)
            lines.append(f"{mark} {count:3} {text}")
            at += count
    return lines


@every_family
def test_tokens_and_labels_are_those_of_the_table(name: str) -> None:
    encoder = encoder_of(name)
    lines = table(encoder, "a conversation", encoder(conversation_of(name)))
    if FAMILIES[name].thoughts:
        lines += ["", *table(encoder, "with thoughts", encoder(conversation_of(name, thoughts=True)))]
    file = TABLES / f"{name}.txt"
    if os.environ.get("SPD_RENEW"):
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert file.read_text(encoding="utf-8") == "\n".join(lines) + "\n"


@every_family
def test_turns_share_a_sample_where_the_template_remembers_them_as_they_were_answered(name: str) -> None:
    plain = [{**message, "content": message["content"].strip()} for message in conversation_of(name)]
    assert len(encoder_of(name)(plain)) == (2 if name in REWRITTEN else 1)
    # an answer's own newlines would be one token with that of its header; templates that trim know none
    trims = name not in ("qwen2_5", "qwen3_instruct_2507")
    assert len(encoder_of(name)(conversation_of(name))) == (2 if name in REWRITTEN or not trims else 1)


# -- any conversation ------------------------------------------------------------------------------------------------

#: What could be mistaken for structure, or is hard to cut into tokens.
PIECES = [
    "{{ 7 * 7 }}",
    "{% generation %}x{% endgeneration %}",
    "{%- if false %}",
    "```python\nfor x in y:\n    pass\n```",
    "the file",
    "\n",
    "\n\n",
    "  ",
    "\t",
    "\r\n",
    "\x00",
    "e\u0301",
    "\U0001f469\u200d\U0001f4bb",
    "\u202e\u05e9\u05dc\u05d5\u05dd",
    "\u00a0\u3000",
    "\ufeff",
]


@st.composite
def conversations(draw: st.DrawFn, name: str, rounds: int = 3) -> Messages:
    family = FAMILIES[name]
    pieces = st.sampled_from(PIECES) | st.sampled_from(family.special) | st.text(max_size=5)
    texts = st.lists(pieces, max_size=4).map("".join)
    said = texts.filter(str.strip)  # cleaning lets no empty turn through
    messages = [{"role": "system", "content": draw(texts)}] if family.system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, rounds))):
        messages.append({"role": "user", "content": draw(said)})
        thoughts = {"reasoning_content": draw(said)} if family.thoughts and draw(st.booleans()) else {}
        messages.append({"role": "assistant", "content": draw(said), **thoughts})
    return messages


@every_family
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_every_turn_is_labelled_once_behind_the_prompt_that_asks_for_it(name: str, data: st.DataObject) -> None:
    messages = data.draw(conversations(name))
    encoder = encoder_of(name)
    # what templates of OpenAI's read is the same under its own name
    known = [{**m, "thinking": m["reasoning_content"]} if "reasoning_content" in m else m for m in messages]
    expected = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            asked = rendered(name, known[:number], prompt=True)
            ids = encoder.tokenizer(asked, add_special_tokens=False)["input_ids"]
            assert text_of(encoder, ids) == asked == encoder.prompt_text(messages[:number])
            expected.append((ids, FAMILIES[name].answer(message["content"], message.get("reasoning_content", ""))))
    samples = encoder(messages)
    assert turns_of(encoder, samples) == expected
    assert all(sample.labels == sample.labelled.sum() for sample in samples), "turns do not overlap"
    assert turns_of(encoder, encoder_of(name, turns="last")(messages)) == expected[-1:]


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.header is not None])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_generation_tags_say_the_same_but_for_the_header_that_some_take_in(name: str, data: st.DataObject) -> None:
    header = FAMILIES[name].header
    assert header is not None
    messages = data.draw(conversations(name, rounds=1))
    tagged, untagged = encoder_of(name, "_training"), encoder_of(name)
    assert tagged.has_tags and not untagged.has_tags
    ((early, more),), ((ids, text),) = turns_of(tagged, tagged(messages)), turns_of(untagged, untagged(messages))
    assert (text_of(tagged, early) + header, more) == (text_of(untagged, ids), header + text)


# -- dates and refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "written"), [("gptoss", "Current date: 2024-02-29\n"), ("llama3_2", "Today Date: 29 Feb 2024\n")]
)
def test_templates_write_the_fixed_date(name: str, written: str) -> None:
    tokenizer = encoder_of(name).tokenizer
    tokenizer.chat_template = template_of(name)
    encoder = ChatEncoder(tokenizer, 1000, ChatOptions(date="2024-02-29"))
    assert written in text_of(encoder, encoder(SHORT)[0].ids) and written in encoder.prompt_text(SHORT[:2])


def refusal(name: str, messages: Messages) -> BadRowError:
    with pytest.raises(BadRowError) as caught:
        encoder_of(name)(messages)
    assert "\n" not in caught.value.detail
    return caught.value


@pytest.mark.parametrize(
    ("name", "messages", "said"),
    [
        ("gemma", SHORT, "TemplateError: System role not supported"),
        ("gemma", [SHORT[1], SHORT[1], SHORT[2]], "TemplateError: Conversation roles must alternate"),
        ("mistral_v3", [SHORT[1], SHORT[1], SHORT[2]], "conversation roles must alternate"),
        (
            "qwen3_5_think",
            [{"role": "observer", "content": "x"}, *SHORT[1:]],
            "TemplateError: Unexpected message role.",
        ),
        ("gptoss", [SHORT[1], {"role": "assistant", "content": "<|channel|>final<|message|>x"}], "<|channel|> tags"),
    ],
    ids=["a system message", "two questions", "two questions for Mistral", "an unknown role", "tags in an answer"],
)
def test_what_a_template_will_not_render_is_a_bad_row_that_says_why(name: str, messages: Messages, said: str) -> None:
    found = refusal(name, messages)
    assert found.reason == "the chat template raises" and said in found.detail


def test_a_template_that_answers_without_the_system_message_it_asks_with_is_refused() -> None:
    found = refusal("mistral_v3", SHORT)
    assert found.reason == "the chat template answers otherwise than it asks" and "message 2" in found.detail


def test_thoughts_are_refused_where_the_prompt_says_that_there_are_none() -> None:
    found = refusal("qwen3_no_thinking", conversation_of("qwen3_no_thinking", thoughts=True))
    assert found.reason == "the chat template answers otherwise than it asks"


@pytest.mark.parametrize("answer", ["4", "<think>\nhm\n</think>\n\n4"])
def test_a_template_that_asks_for_thoughts_and_drops_them_is_refused(answer: str) -> None:
    special = ("<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>")
    tokenizer = tokenizer_of((*special, "<\uff5cend\u2581of\u2581sentence\uff5c>"), THINK, special[0])
    tokenizer.chat_template = template_of("deepseek_r1_distill")
    with pytest.raises(BadRowError) as caught:
        ChatEncoder(tokenizer, 1000)([SHORT[1], {"role": "assistant", "content": answer}])
    assert caught.value.reason == "the chat template answers otherwise than it asks"
    assert "{% generation %}" in caught.value.detail
