"""From conversations to labels: by generation tags and by rendering prefixes, on text that tries to confuse both."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import groupby
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spd_lightning.errors import InputError
from spd_lightning.training.chat import ChatEncoder, Sample

Conversation = list[dict[str, str]]

END = "<|end|>"
UNTAGGED = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
#: The widespread form with a newline between turns, once without and once with generation tags.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_TAGGED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' }}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{{ '\n' }}{% else %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
#: What could be mistaken for structure when it stands inside a message.
CONFUSING = [
    "{{ 7 * 7 }}",
    "{% generation %}",
    "{% endgeneration %}",
    "{% for x in y %}",
    END,
    "<|assistant|>",
    "<|user|>hello<|end|><|assistant|>no<|end|>",
    "<|pad|>",
    "\n\n",
    " ",
    "",
    "\x00",
    "e\u0301 \u202e \U0001f469\u200d\U0001f4bb \ufeff",
    "the file",
]

texts = st.lists(st.sampled_from(CONFUSING) | st.text(max_size=6), max_size=3).map("".join)


@st.composite
def conversations(draw: st.DrawFn, rounds: int = 3) -> Conversation:
    """Rounds of user and assistant, now and then with a system message, two answers in a row or an open question."""
    messages = [{"role": "system", "content": draw(texts)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, rounds))):
        messages.append({"role": "user", "content": draw(texts)})
        for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
            messages.append({"role": "assistant", "content": draw(texts)})
    if draw(st.booleans()):
        messages.append({"role": "user", "content": draw(texts)})
    return messages


@pytest.fixture(scope="module")
def tagged(make_tokenizer: Callable[..., Any]) -> ChatEncoder:
    return ChatEncoder(make_tokenizer(), 100_000)


@pytest.fixture(scope="module")
def untagged(make_tokenizer: Callable[..., Any]) -> ChatEncoder:
    return ChatEncoder(make_tokenizer(UNTAGGED), 100_000)


@pytest.fixture(scope="module")
def chatml(make_tokenizer: Callable[..., Any]) -> Callable[[str], ChatEncoder]:
    def encoder(template: str) -> ChatEncoder:
        tokenizer = make_tokenizer(template)
        tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        return ChatEncoder(tokenizer, 100_000)

    return encoder


def turns(sample: Sample) -> list[list[int]]:
    """The runs of labelled tokens."""
    pairs = zip(sample.labelled, sample.ids, strict=True)
    return [[token for _, token in run] for mine, run in groupby(pairs, key=lambda pair: pair[0]) if mine]


def said(messages: Conversation, end: str = END) -> list[str]:
    return [message["content"] + end for message in messages if message["role"] == "assistant"]


def text_of(encoder: ChatEncoder, ids: list[int]) -> str:
    return encoder.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def refusal(action: Callable[[], object]) -> str:
    """The message of the InputError that the action ends with: one line."""
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


def test_the_two_ways_to_find_labels_are_really_both_tested(tagged: ChatEncoder, untagged: ChatEncoder) -> None:
    assert tagged.has_tags and not untagged.has_tags


HYPOTHESIS = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@HYPOTHESIS
@given(messages=conversations())
def test_labelled_tokens_are_what_the_assistant_said_by_tags_and_by_prefixes(
    tagged: ChatEncoder, untagged: ChatEncoder, messages: Conversation
) -> None:
    sample = tagged(messages, 7)
    assert sample == untagged(messages, 7), "generation tags and prefixes agree in ids, labels and turn starts"
    assert [text_of(tagged, turn) for turn in turns(sample)] == said(messages)
    labelled = [token for token, mine in zip(sample.ids, sample.labelled, strict=True) if mine]
    assert text_of(tagged, labelled) == "".join(said(messages))
    # every turn starts right after the header that the template writes, wherever else that header may stand
    assert len(sample.turn_starts) == len(said(messages))
    for start in sample.turn_starts:
        assert sample.labelled[start] and not sample.labelled[start - 1]
        assert text_of(tagged, [sample.ids[start - 1]]) == "<|assistant|>"
    whole = tagged.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert list(sample.ids) == whole


@HYPOTHESIS
@given(messages=conversations())
def test_the_prompt_is_what_a_generation_prompt_renders(tagged: ChatEncoder, messages: Conversation) -> None:
    first = next(number for number, message in enumerate(messages) if message["role"] == "assistant")
    wanted = tagged.tokenizer.apply_chat_template(
        messages[:first], add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    assert tagged(messages, 0).prompt == wanted


@HYPOTHESIS
@given(messages=conversations(), length=st.integers(1, 40))
def test_a_cut_conversation_is_the_beginning_of_the_whole_one(
    tagged: ChatEncoder, untagged: ChatEncoder, messages: Conversation, length: int
) -> None:
    whole = tagged(messages, 0)
    for encoder in (tagged, untagged):
        cut = ChatEncoder(encoder.tokenizer, length)(messages, 0)
        assert cut.ids == whole.ids[:length] and cut.labelled == whole.labelled[:length]
        assert cut.turn_starts == tuple(start for start in whole.turn_starts if start < length)


def test_labels_by_hand(tagged: ChatEncoder) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "bc"},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": ""},
    ]
    sample = tagged(messages, 3)
    # <|user|> a <|end|> <|assistant|> b c <|end|> <|user|> d <|end|> <|assistant|> <|end|>
    assert [text_of(tagged, [token]) for token in sample.ids] == [
        "<|user|>", "a", END, "<|assistant|>", "b", "c", END, "<|user|>", "d", END, "<|assistant|>", END
    ]  # fmt: skip
    assert [int(mine) for mine in sample.labelled] == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1]
    assert sample.turn_starts == (4, 11) and sample.index == 3
    assert sample.prompt == list(sample.ids[:4])


def test_a_conversation_without_an_answer_has_no_labels_and_no_prompt(tagged: ChatEncoder) -> None:
    sample = tagged([{"role": "user", "content": "hello"}], 0)
    assert not any(sample.labelled) and sample.turn_starts == () and sample.prompt == []


def test_tags_and_prefixes_agree_on_every_spelling_of_the_tag(make_tokenizer: Callable[..., Any]) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "the file"}]
    found = set()
    for opening in ("{% generation %}", "{%- generation %}", "{%generation%}", "{%-  generation -%}"):
        template = make_tokenizer().chat_template.replace("{% generation %}", opening)
        found.add(ChatEncoder(make_tokenizer(template), 100)(messages, 0))
    assert len(found) == 1


def test_the_newline_after_an_end_of_turn_is_not_what_the_assistant_wrote(
    chatml: Callable[[str], ChatEncoder],
) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "bc"},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": "e"},
    ]
    by_tags, by_prefixes = chatml(CHATML_TAGGED), chatml(CHATML)
    expected = said(messages, "<|im_end|>")
    assert [text_of(by_tags, turn) for turn in turns(by_tags(messages, 0))] == expected
    assert [text_of(by_prefixes, turn) for turn in turns(by_prefixes(messages, 0))] == expected


def test_turn_starts_and_prompts_do_not_depend_on_what_follows_a_turn(chatml: Callable[[str], ChatEncoder]) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "bc"},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": "e"},
    ]
    by_tags, by_prefixes = chatml(CHATML_TAGGED)(messages, 0), chatml(CHATML)(messages, 0)
    assert by_tags.ids == by_prefixes.ids
    assert by_tags.turn_starts == by_prefixes.turn_starts
    assert by_tags.prompt == by_prefixes.prompt


@pytest.mark.parametrize(
    "template",
    [
        # earlier answers lose their first character once a question follows, as templates that drop old thoughts do
        "{% for m in messages %}<|{{ m['role'] }}|>"
        "{% if loop.last or m['role'] != 'assistant' %}{{ m['content'] }}{% else %}{{ m['content'][1:] }}{% endif %}"
        "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        # the generation prompt says more than the header of an answer does
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>think{% endif %}",
        # the number of messages stands in front
        "{{ messages | length }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    ],
    ids=["old answers change", "another header", "a counter in front"],
)
def test_a_template_whose_renderings_are_no_prefixes_is_refused_in_one_line(
    make_tokenizer: Callable[..., Any], template: str
) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "bc"},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": "ef"},
    ]
    message = refusal(lambda: ChatEncoder(make_tokenizer(template), 100)(messages, 0))
    assert "chat template" in message and "generation %}" in message


def test_a_tokenizer_without_a_chat_template_is_refused_by_name(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(None)
    tokenizer.name_or_path = "some/base-model"
    message = refusal(lambda: ChatEncoder(tokenizer, 100))
    assert "'some/base-model'" in message and "chat template" in message


def test_encoding_has_no_state(tagged: ChatEncoder) -> None:
    draw = random.Random(0)
    samples = [
        [{"role": "user", "content": str(draw.random())}, {"role": "assistant", "content": str(draw.random())}]
        for _ in range(5)
    ]
    forwards = [tagged(messages, index) for index, messages in enumerate(samples)]
    backwards = [tagged(messages, index) for index, messages in reversed(list(enumerate(samples)))]
    assert forwards == backwards[::-1]
