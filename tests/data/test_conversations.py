"""Every chat format becomes one shape, and what cannot is refused by a reason that can be counted."""

from __future__ import annotations

import json
from typing import Any

import pytest

from spd_lightning.data.conversations import Conversation, conversation
from spd_lightning.data.tally import BadRowError

QUESTION, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
PAIR = (QUESTION, ANSWER)


def parse(row: dict[str, Any], tools: Any = "drop", **columns: str) -> Conversation:
    return conversation(row, columns, tools)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [QUESTION, ANSWER]},
        {"messages": json.dumps([QUESTION, ANSWER])},
        {"conversations": [QUESTION, ANSWER]},
        {"conversation": [QUESTION, ANSWER], "extra": 1},
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]},
        {"conversations": [{"from": "User", "value": "Why?"}, {"from": "bot", "value": "Because."}]},
        {
            "messages": [
                QUESTION | {"content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]},
                ANSWER,
            ]
        },
        {"prompt": "Why?", "response": "Because."},
        {"instruction": "Why?", "input": "", "output": "Because."},
        {"question": "Why?", "answer": "Because."},
        {"prompt": [QUESTION], "completion": [ANSWER]},
        {"messages": [QUESTION, ANSWER, {"role": "user", "content": "And?"}]},
        {"messages": [ANSWER, QUESTION, ANSWER]},
        {"messages": [QUESTION, ANSWER], "prompt": "Why?", "prompt_id": "0"},
        {"messages": [], "prompt": "Why?", "response": "Because."},
        {"messages": {"role": ["user", "assistant"], "content": ["Why?", "Because."], "tool_calls": None}},
        {
            "conversations": [
                {"role": None, "content": None, "from": "human", "value": "Why?"},
                {"role": None, "content": None, "from": "gpt", "value": "Because."},
            ]
        },
    ],
    ids=str,
)
def test_all_usual_formats_say_the_same(row: dict[str, Any]) -> None:
    assert parse(row).messages == PAIR


def test_other_columns_are_read_where_they_are_named() -> None:
    row = {"prompt": "no", "response": "no", "q": "Why?", "a": "Because.", "s": "Be short.", "key": 7}
    found = parse(row, prompt="q", response="a", system="s", id="key")
    assert found.messages == ({"role": "system", "content": "Be short."}, *PAIR) and found.id == "7"
    assert parse({"messages": [QUESTION, ANSWER], "body": "plain"}, text="body").text == "plain"


@pytest.mark.parametrize("row", [{"messages": [QUESTION, ANSWER]}, {"prompt": "Why?", "response": "Because."}])
def test_a_system_prompt_of_its_own_column_comes_first_where_the_row_has_one(row: dict[str, Any]) -> None:
    system = {"role": "system", "content": "Be short."}
    assert parse(row | {"system": "Be short."}).messages == (system, *PAIR)
    assert parse(row | {"s": "Be short."}, system="s").messages == (system, *PAIR)
    for nothing in (None, " "):
        assert parse(row | {"s": nothing}, system="s").messages == PAIR
    assert parse({"messages": [system, QUESTION, ANSWER], "system": "Be long."}).messages == (system, *PAIR)


def test_an_id_that_no_file_can_hold_gives_way_to_the_digest() -> None:
    row = {"messages": [QUESTION, ANSWER]}
    assert parse(row | {"id": "\ud800"}).id == parse(row).content_digest != parse(row | {"id": "a"}).id


def test_an_instruction_with_an_input_and_a_system_prompt_keep_all_parts() -> None:
    found = parse({"instruction": "Translate.", "input": "Oui", "output": "Yes", "system": "Be short."})
    contents = [message["content"] for message in found.messages]
    assert contents == ["Be short.", "Translate.\n\nOui", "Yes"]
    dolly = parse({"instruction": "Translate.", "context": "Oui", "response": "Yes", "category": "x"})
    assert dolly.messages[0]["content"] == "Translate.\n\nOui"


def test_a_plain_text_has_no_turns() -> None:
    found = parse({"text": " once upon a time "})
    assert found.text == " once upon a time " and found.messages == () and found.texts() == [found.text]


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
RESULT = {"role": "tool", "content": "42", "tool_call_id": "1"}


def test_tool_turns_are_kept_or_dropped_with_their_calls() -> None:
    row = {"messages": [QUESTION, CALL, RESULT, RESULT, ANSWER], "tools": json.dumps([{"name": "f"}])}
    assert parse(row).messages == PAIR and parse(row).tools == ()
    kept = parse(row, tools="keep")
    assert [m["role"] for m in kept.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert kept.messages[1]["content"] == "" and kept.messages[1]["tool_calls"] == CALL["tool_calls"]
    assert kept.tools == ({"name": "f"},)
    called = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}
    said = {"conversations": [{"from": "human", "value": "Why?"}, called, {"from": "observation", "value": "42"},
                              {"from": "gpt", "value": "Because."}]}  # fmt: skip
    assert parse(said).messages == PAIR
    assert parse(said, tools="keep").messages[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": {}}}
    ]


def test_thoughts_and_what_else_templates_read_stay_and_other_fields_go() -> None:
    thoughtful = ANSWER | {"reasoning_content": "Hm.", "weight": 1, "name": None}
    assert parse({"messages": [QUESTION, thoughtful]}).messages[1] == ANSWER | {"reasoning_content": "Hm."}


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        ({"a": 1, "b": 2}, "unknown fields", "['a', 'b']"),
        ({"prompt": "x"}, "unknown fields", "prompt without a response"),
        ({"messages": 3}, "not a list of messages", "int"),
        ({"messages": "hello"}, "not a list of messages", "str"),
        ({"messages": "[oops"}, "not a list of messages", "no JSON"),
        ({"messages": [QUESTION, "hello"]}, "not a list of messages", "message 1 is str"),
        ({"messages": [{"content": "x"}, ANSWER]}, "unknown role", "message 0 has None"),
        ({"messages": [QUESTION, {"role": "wizard", "content": "x"}]}, "unknown role", "message 1 has 'wizard'"),
        ({"messages": [QUESTION, ANSWER, ANSWER]}, "two assistant turns in a row", "messages 1 and 2"),
        ({"messages": [QUESTION, QUESTION, ANSWER]}, "two user turns in a row", "messages 0 and 1"),
        ({"messages": [QUESTION, {"role": "system", "content": "x"}, ANSWER]}, "system turn in the middle", "1"),
        ({"messages": [ANSWER]}, "no user turn", ""),
        ({"messages": [{"role": "system", "content": "x"}, ANSWER]}, "no user turn", ""),
        ({"messages": [QUESTION]}, "no assistant turn", ""),
        ({"messages": [ANSWER, QUESTION]}, "no assistant turn", ""),
        ({"messages": []}, "unknown fields", "['messages']"),
        ({"prompt": "2+2", "answer": 4}, "not text", "int"),
        ({"prompt": 22, "answer": "4"}, "not text", "int"),
        ({"prompt": "2+2", "answer": {"text": "4"}}, "not text", "dict"),
        ({"prompt": "2+2", "answer": "\ud800"}, "not UTF-8", "message 0"),
        ({"text": "a\ud800"}, "not UTF-8", "text"),
        ({"messages": [QUESTION, ANSWER | {"reasoning_content": "\ud800"}]}, "not UTF-8", "message 1"),
        ({"messages": [QUESTION, ANSWER | {"reasoning_content": 3}]}, "not text", "reasoning_content of message 1"),
        ({"messages": "[" * 100_000}, "not a list of messages", "no JSON"),
        ({"messages": [QUESTION, {"role": "assistant", "content": " \n"}]}, "empty content", "message 1, assistant"),
        ({"messages": [{"role": "user", "content": ""}, ANSWER]}, "empty content", "message 0, user"),
        ({"messages": [QUESTION, {"role": "assistant", "content": None}]}, "not text", "NoneType"),
        ({"messages": [QUESTION | {"content": [{"type": "image"}]}, ANSWER]}, "not text", "image"),
        ({"messages": [QUESTION, {"role": "assistant", "content": "\ud83d"}]}, "not UTF-8", "surrogate"),
        ({"text": "  "}, "empty content", "text"),
        ({"text": 3}, "not text", "int"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_refused_by_reason_and_place(row: dict[str, Any], reason: str, detail: str) -> None:
    with pytest.raises(BadRowError) as caught:
        parse(row)
    assert caught.value.reason == reason and detail in caught.value.detail
    assert str(caught.value.at("x.jsonl:3")).startswith(f"x.jsonl:3: {reason}")


def test_an_empty_system_turn_is_allowed() -> None:
    assert len(parse({"messages": [{"role": "system", "content": ""}, QUESTION, ANSWER]}).messages) == 3


def test_a_conversation_is_named_by_its_id_or_its_content() -> None:
    unnamed = parse({"messages": [QUESTION, ANSWER]})
    assert parse({"id": "a", "messages": [QUESTION, ANSWER]}).id == "a"
    assert unnamed.id == unnamed.content_digest == parse({"prompt": "Why?", "response": "Because."}).id
    assert unnamed.id != parse({"prompt": "Why?", "response": "Because!"}).id
    for useless in (None, "", True, 1.5, []):
        assert parse({"id": useless, "messages": [QUESTION, ANSWER]}).id == unnamed.id


def test_what_is_written_reads_back_as_it_was() -> None:
    for row in ({"messages": [QUESTION, ANSWER], "tools": [{"name": "f"}]}, {"text": "x"}, {"id": "7", "text": "y"}):
        found = parse(row, tools="keep")
        assert parse(json.loads(json.dumps(found.as_row())), tools="keep") == found
