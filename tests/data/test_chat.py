"""From conversations to labels: by generation tags and by rendering prefixes, on text that tries to confuse both."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spd_lightning.data.chat import TEXT_PROMPT, ChatEncoder, ChatOptions, Sample
from spd_lightning.data.conversations import Conversation
from spd_lightning.data.tally import BadRowError
from spd_lightning.errors import InputError

Messages = list[dict[str, str]]

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
def conversations(draw: st.DrawFn, rounds: int = 3) -> Messages:
    """Rounds of user and assistant, now and then with a system message, two answers in a row or an open question.

    Wilder than what cleaning lets through: the encoder does not rely on it.
    """
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


def only(samples: list[Sample]) -> Sample:
    assert len(samples) == 1
    return samples[0]


def turns(sample: Sample) -> list[list[int]]:
    return [sample.ids[start:stop].tolist() for start, stop in sample.turns]


def said(messages: Messages, end: str = END) -> list[str]:
    return [message["content"] + end for message in messages if message["role"] == "assistant"]


def text_of(encoder: ChatEncoder, ids: list[int]) -> str:
    return encoder.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def fault(encoder: ChatEncoder, messages: Messages) -> BadRowError:
    """What makes a conversation unusable: one line each."""
    with pytest.raises(BadRowError) as caught:
        encoder(messages)
    assert "\n" not in caught.value.reason + caught.value.detail and len(caught.value.detail) < 400
    return caught.value


def round_of(question: str, answer: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


TWO_ROUNDS = round_of("a", "bc") + round_of("d", "e")


def test_the_two_ways_to_find_labels_are_really_both_tested(tagged: ChatEncoder, untagged: ChatEncoder) -> None:
    assert tagged.has_tags and not untagged.has_tags


HYPOTHESIS = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@HYPOTHESIS
@given(messages=conversations())
def test_labelled_tokens_are_what_the_assistant_said_by_tags_and_by_prefixes(
    tagged: ChatEncoder, untagged: ChatEncoder, messages: Messages
) -> None:
    sample = only(tagged(messages, 7))
    if messages[-1]["role"] == "user":  # by prefixes, a text ends with its last answer
        messages = messages[:-1]
        assert only(untagged(messages, 7)) == only(tagged(messages, 7))
    else:
        assert sample == only(untagged(messages, 7)), "generation tags and prefixes agree in ids and turns"
    assert [text_of(tagged, turn) for turn in turns(sample)] == said(messages)
    assert text_of(tagged, sample.ids[sample.labelled].tolist()) == "".join(said(messages))
    assert sample.labels == sample.labelled.sum()
    # every turn starts right after the header that the template writes, wherever else that header may stand
    for start, _ in sample.turns:
        assert sample.labelled[start] and not sample.labelled[start - 1]
        assert text_of(tagged, [sample.ids[start - 1]]) == "<|assistant|>"


@HYPOTHESIS
@given(messages=conversations())
def test_the_ids_are_those_of_the_whole_rendering(tagged: ChatEncoder, messages: Messages) -> None:
    whole = tagged.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert only(tagged(messages)).ids.tolist() == whole and only(tagged(messages)).ids.dtype == np.int32


@HYPOTHESIS
@given(messages=conversations())
def test_the_prompt_is_what_a_generation_prompt_renders(tagged: ChatEncoder, messages: Messages) -> None:
    first = next(number for number, message in enumerate(messages) if message["role"] == "assistant")
    wanted = tagged.tokenizer.apply_chat_template(
        messages[:first], add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    assert only(tagged(messages)).prompt == wanted
    text = tagged.prompt_text(messages[:first])
    assert tagged.tokenizer(text, add_special_tokens=False)["input_ids"] == wanted


@HYPOTHESIS
@given(messages=conversations(), length=st.integers(1, 40))
def test_a_cut_conversation_is_the_beginning_of_the_whole_one(
    tagged: ChatEncoder, untagged: ChatEncoder, messages: Messages, length: int
) -> None:
    whole = only(tagged(messages))
    for encoder in (tagged, untagged):
        short = ChatEncoder(encoder.tokenizer, length)
        if whole.turns[0][0] >= length:
            assert fault(short, messages).reason == "no labelled token"
            continue
        cut = only(short(messages))
        assert cut.ids.tolist() == whole.ids[:length].tolist()
        assert cut.labelled.tolist() == whole.labelled[:length].tolist()
        assert [start for start, _ in cut.turns] == [start for start, _ in whole.turns if start < length]


def test_labels_by_hand(tagged: ChatEncoder) -> None:
    sample = only(tagged(round_of("a", "bc") + round_of("d", ""), 3))
    assert [text_of(tagged, [token]) for token in sample.ids] == [
        "<|user|>", "a", END, "<|assistant|>", "b", "c", END, "<|user|>", "d", END, "<|assistant|>", END
    ]  # fmt: skip
    assert [int(mine) for mine in sample.labelled] == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1]
    assert sample.turns == ((4, 7), (11, 12)) and sample.index == 3 and sample.labels == 4
    assert sample.prompt == list(sample.ids[:4]) and len(sample) == 12


@pytest.mark.parametrize("encoder", ["tagged", "untagged"])
def test_a_conversation_without_an_answer_has_nothing_to_learn(encoder: str, request: pytest.FixtureRequest) -> None:
    assert fault(request.getfixturevalue(encoder), [{"role": "user", "content": "hello"}]).reason == "no labelled token"


def test_a_conversation_cut_before_its_first_answer_says_how_long_it_is(tagged: ChatEncoder) -> None:
    found = fault(ChatEncoder(tagged.tokenizer, 4), TWO_ROUNDS)
    assert (found.reason, found.detail) == ("no labelled token", "within 4 tokens, of 13")


def test_tags_and_prefixes_agree_on_every_spelling_of_the_tag(make_tokenizer: Callable[..., Any]) -> None:
    found = []
    for opening in ("{% generation %}", "{%- generation %}", "{%generation%}", "{%-  generation -%}"):
        template = make_tokenizer().chat_template.replace("{% generation %}", opening)
        encoder = ChatEncoder(make_tokenizer(template), 100)
        assert encoder.has_tags
        found.append(only(encoder(round_of("a", "the file"))))
    assert all(sample == found[0] for sample in found)


def test_the_newline_after_an_end_of_turn_is_not_what_the_assistant_wrote(
    chatml: Callable[[str], ChatEncoder],
) -> None:
    by_tags, by_prefixes = chatml(CHATML_TAGGED), chatml(CHATML)
    expected = said(TWO_ROUNDS, "<|im_end|>")
    assert [text_of(by_tags, turn) for turn in turns(only(by_tags(TWO_ROUNDS)))] == expected
    assert only(by_tags(TWO_ROUNDS)) == only(by_prefixes(TWO_ROUNDS))


def test_a_newline_that_tags_take_in_behind_the_end_of_turn_is_not_labelled(
    chatml: Callable[[str], ChatEncoder],
) -> None:
    wider = CHATML_TAGGED.replace("{% endgeneration %}{{ '\n' }}", "{{ '\n' }}{% endgeneration %}")
    assert wider != CHATML_TAGGED
    assert only(chatml(wider)(TWO_ROUNDS)) == only(chatml(CHATML_TAGGED)(TWO_ROUNDS))


def test_turns_that_are_answered_otherwise_than_they_are_remembered_get_samples_of_their_own(
    make_tokenizer: Callable[..., Any],
) -> None:
    # an answer loses its first character once a question follows, as templates that drop old thoughts do
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>"
        "{% if loop.last or m['role'] != 'assistant' %}{{ m['content'] }}{% else %}{{ m['content'][1:] }}{% endif %}"
        "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    encoder = ChatEncoder(make_tokenizer(template), 100)
    samples = encoder(TWO_ROUNDS, 5)
    assert [sample.index for sample in samples] == [5, 6]
    assert [text_of(encoder, sample.ids.tolist()) for sample in samples] == [
        "<|user|>a<|end|><|assistant|>bc<|end|>",
        "<|user|>a<|end|><|assistant|>c<|end|><|user|>d<|end|><|assistant|>e<|end|>",
    ]
    assert [[text_of(encoder, turn) for turn in turns(sample)] for sample in samples] == [["bc<|end|>"], ["e<|end|>"]]


@pytest.mark.parametrize(
    "template",
    [
        # the generation prompt says more than the header of an answer does
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>think{% endif %}",
        # the number of messages stands in front
        "{{ messages | length }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    ],
    ids=["another header", "a counter in front"],
)
def test_a_template_whose_prompts_are_no_prefixes_is_refused(make_tokenizer: Callable[..., Any], template: str) -> None:
    found = fault(ChatEncoder(make_tokenizer(template), 100), TWO_ROUNDS)
    assert found.reason == "the chat template answers otherwise than it asks"
    assert "message 1" in found.detail and "{% generation %}" in found.detail


def test_a_turn_whose_first_token_would_reach_into_the_prompt_is_tokenised_as_at_inference(
    make_tokenizer: Callable[..., Any],
) -> None:
    # "the" is one token: a prompt that ends with "t" and an answer that begins with "he" must not share it
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}t{% endif %}{{ m['content'] }}"
        "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>t{% endif %}"
    )
    encoder = ChatEncoder(make_tokenizer(template), 100)
    apart, later = encoder(round_of("a", "he") + round_of("d", "x"))
    assert [text_of(encoder, [token]) for token in apart.ids] == [
        "<|user|>",
        "a",
        END,
        "<|assistant|>",
        "t",
        "h",
        "e",
        END,
    ]
    assert apart.turns == ((5, 8),)
    # in the prompt of the next answer the older one is one text with its header, as at inference
    assert [text_of(encoder, [token]) for token in later.ids[:6]] == ["<|user|>", "a", END, "<|assistant|>", "the", END]
    assert [text_of(encoder, turn) for turn in turns(later)] == ["x" + END]


def test_the_tokens_of_a_prompt_are_its_own_even_where_no_token_crosses_its_end(
    make_tokenizer: Callable[..., Any],
) -> None:
    # GPT-2's pattern takes two newlines as one piece at the end of a text, and as two pieces before a letter
    template = "{% for m in messages %}{{ m['content'] ~ ('\n\n' if not loop.last or add_generation_prompt) }}"
    tokenizer = make_tokenizer(template + "{% endfor %}")
    tokenizer.backend_tokenizer.model = _with_double_newline(tokenizer)
    sample = only(ChatEncoder(tokenizer, 100)(round_of("a", "b")))
    assert [tokenizer.decode([token]) for token in sample.ids] == ["a", "\n\n", "b"]
    assert sample.turns == ((2, 3),)


def _with_double_newline(tokenizer: Any) -> Any:
    from tokenizers import models

    vocab = tokenizer.get_vocab()
    return models.BPE(vocab={**vocab, "\u010a\u010a": len(vocab)}, merges=[("\u010a", "\u010a")])


def test_only_the_last_turn_is_learned_from_where_that_is_asked_for(tagged: ChatEncoder, untagged: ChatEncoder) -> None:
    for encoder in (tagged, untagged):
        whole = only(encoder(TWO_ROUNDS))
        last = only(ChatEncoder(encoder.tokenizer, 100, ChatOptions(turns="last"))(TWO_ROUNDS))
        assert last.ids.tolist() == whole.ids.tolist() and last.turns == whole.turns[-1:]


def test_a_plain_text_is_labelled_throughout_and_goes_on_in_further_samples(tagged: ChatEncoder) -> None:
    text = "the file opens a path " * 10 + END
    whole = tagged.tokenizer(text, add_special_tokens=False)["input_ids"]
    samples = ChatEncoder(tagged.tokenizer, 16).encode([Conversation("x", text=text)])[0]
    assert not isinstance(samples, BadRowError)
    assert [token for sample in samples for token in sample.ids] == whole
    assert all(sample.labelled.all() for sample in samples)
    assert [sample.index for sample in samples] == list(range(len(samples)))
    (long,) = tagged.encode([Conversation("x", text=text)])[0]
    assert long.prompt == whole[:TEXT_PROMPT]


def test_plain_texts_need_no_chat_template_and_chats_without_one_are_refused_by_name(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer(None)
    tokenizer.name_or_path = "some/base-model"
    encoder = ChatEncoder(tokenizer, 100)
    assert not isinstance(encoder.encode([Conversation("x", text="the file")])[0], BadRowError)
    with pytest.raises(InputError, match="'some/base-model' has no chat template") as caught:
        encoder(TWO_ROUNDS)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_one_bad_conversation_leaves_the_others_of_a_batch_alone(tagged: ChatEncoder) -> None:
    good = Conversation("g", tuple(TWO_ROUNDS))
    before, bad, after = tagged.encode([good, Conversation("b", ({"role": "user", "content": "a"},)), good])
    assert isinstance(bad, BadRowError)
    assert before == after == tagged(TWO_ROUNDS)


def test_encoding_has_no_state(tagged: ChatEncoder) -> None:
    draw = random.Random(0)
    samples = [round_of(str(draw.random()), str(draw.random())) for _ in range(5)]
    forwards = [tagged(messages, index) for index, messages in enumerate(samples)]
    backwards = [tagged(messages, index) for index, messages in reversed(list(enumerate(samples)))]
    assert forwards == backwards[::-1]
    assert [made for batch in tagged.encode([Conversation("", tuple(m)) for m in samples]) for made in batch] == [
        Sample(0, sample.ids, sample.turns) for (sample,) in forwards
    ]


def test_a_file_replaces_the_template_of_the_tokenizer(make_tokenizer: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "other.jinja").write_text(UNTAGGED, encoding="utf-8")
    options = ChatOptions(template=str(tmp_path / "other.jinja"))
    assert ChatEncoder(make_tokenizer(None), 100, options)(TWO_ROUNDS) == ChatEncoder(make_tokenizer(), 100)(TWO_ROUNDS)


def test_a_template_file_that_is_no_text_is_refused(make_tokenizer: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "x.jinja").write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"data\.chat\.template=.*x\.jinja' cannot be read"):
        ChatEncoder(make_tokenizer(), 8, ChatOptions(template=str(tmp_path / "x.jinja")))


def test_arguments_reach_the_template_and_its_date_is_the_fixed_one(make_tokenizer: Callable[..., Any]) -> None:
    template = '{{ effort }} {{ strftime_now("%d %b %Y") if strftime_now is defined }}|' + UNTAGGED
    for each in (template, template + "{% if false %}{% generation %}{% endgeneration %}{% endif %}"):
        encoder = ChatEncoder(make_tokenizer(each), 100, ChatOptions(arguments={"effort": "low"}, date="2024-02-03"))
        assert encoder.prompt_text(TWO_ROUNDS[:1]) == "low 03 Feb 2024|<|user|>a<|end|><|assistant|>"


def test_a_date_that_cannot_be_fixed_is_refused(make_tokenizer: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="strftime_now"):
        ChatEncoder(make_tokenizer("{{ strftime_now(format) }}" + UNTAGGED), 100)


@pytest.mark.parametrize("name", ["reasoning_content", "thinking"])
@pytest.mark.parametrize("read", ["reasoning_content", "thinking"])
def test_thoughts_reach_templates_that_know_them_by_another_name(
    make_tokenizer: Callable[..., Any], name: str, read: str
) -> None:
    template = UNTAGGED.replace("+ message['content']", f"+ message.get('{read}', '') + message['content']")
    messages: list[Any] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", name: "hm "}]
    encoder = ChatEncoder(make_tokenizer(template), 100)
    assert [text_of(encoder, turn) for turn in turns(only(encoder(messages)))] == ["hm b" + END]


@pytest.mark.parametrize("options", [{"date": "yesterday"}, {"template": "no/such/file.jinja"}])
def test_wrong_options_are_named(options: dict[str, str]) -> None:
    with pytest.raises(InputError, match=f"chat.{next(iter(options))}"):
        ChatOptions(**options)  # type: ignore[arg-type]
