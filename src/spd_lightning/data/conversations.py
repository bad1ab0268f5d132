"""One shape for every chat format: a row of any source becomes a Conversation, or says why it cannot.

Understood: `messages` and `conversations` with role/content, ShareGPT's from/value, prompt/response pairs under their
usual names, and plain text. Nothing is guessed beyond these names; `Source.columns` names others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from spd_lightning.data.sources import digest
from spd_lightning.data.tally import BadRowError

Message = dict[str, Any]
Tools = Literal["keep", "drop"]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
_CHATS = ("messages", "conversations", "conversation")
_PROMPTS = ("prompt", "instruction", "question", "query")
_RESPONSES = ("response", "output", "answer", "completion")
#: Further fields of a message that templates read.
_KEPT = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")


@dataclass(frozen=True)
class Conversation:
    """A chat, or a plain text.

    Attributes:
        id: the row's own `id`, else a digest of the content.
        messages: role, content and what else a template reads; empty for a plain text.
        text: the plain text, None for a chat.
        tools: descriptions of tools for the template.
    """

    id: str
    messages: tuple[Message, ...] = ()
    text: str | None = None
    tools: tuple[Any, ...] = ()

    @property
    def content_digest(self) -> str:
        """Names the content, whatever the row is called: equal conversations have equal digests."""
        return _digest(self.messages, self.text)

    @property
    def opening(self) -> str:
        """What decides on which side of a train/held-out split it falls: the first user turn, or the whole text.

        Conversations that open alike stay together, and a regenerated response changes nothing.
        """
        first = next((m["content"] for m in self.messages if m["role"] == "user"), self.text or "")
        return " ".join(str(first).split()).casefold()

    def texts(self) -> list[str]:
        """Everything that is said."""
        return [self.text] if self.text is not None else [str(message["content"]) for message in self.messages]

    def as_row(self) -> dict[str, Any]:
        """The JSON form that every step writes and reads."""
        if self.text is not None:
            return {"id": self.id, "text": self.text}
        row: dict[str, Any] = {"id": self.id, "messages": list(self.messages)}
        return row | {"tools": list(self.tools)} if self.tools else row


def conversation(row: Mapping[str, Any], columns: Mapping[str, str], tools: Tools) -> Conversation:
    """What a row says.

    Args:
        row: its fields.
        columns: `Source.columns`.
        tools: keep tool calls, their results and the descriptions of tools, or drop them.

    Raises:
        BadRowError: the reason, by which rows are counted, and the detail.
    """
    described = _column(row, columns, "tools", ("tools",)) if tools == "keep" else None
    if (chat := _column(row, columns, "messages", _CHATS)) is not None:
        found = Conversation("", tuple(_turns(_messages(chat), tools)), tools=_described(described))
    elif (prompt := _column(row, columns, "prompt", _PROMPTS)) is not None:
        found = Conversation("", tuple(_turns(_pair(row, columns, prompt), tools)), tools=_described(described))
    elif (text := _column(row, columns, "text", ("text",))) is not None:
        if not isinstance(text, str):
            raise BadRowError("not text", f"text is {type(text).__name__}")
        if not text.strip():
            raise BadRowError("empty content", "text")
        found = Conversation("", text=text)
    else:
        expected = "messages, conversations, prompt and response, or text"
        raise BadRowError("unknown fields", f"found {sorted(map(str, row))[:8]}, expected {expected}")
    name = row.get(columns.get("id", "id"))
    usable = isinstance(name, (str, int)) and not isinstance(name, bool) and str(name).strip()
    return replace(found, id=str(name) if usable else found.content_digest)


def _column(row: Mapping[str, Any], columns: Mapping[str, str], kind: str, usual: tuple[str, ...]) -> Any:
    if kind in columns:
        if row.get(columns[kind]) is None:
            raise BadRowError("unknown fields", f"{columns[kind]!r} is missing, found {sorted(map(str, row))[:8]}")
        return row[columns[kind]]
    if columns and kind in ("messages", "prompt", "text") and set(columns) & {"messages", "prompt", "text"}:
        return None  # another kind was named
    return next((row[name] for name in usual if row.get(name) is not None), None)


def _pair(row: Mapping[str, Any], columns: Mapping[str, str], prompt: Any) -> list[Message]:
    response = _column(row, columns, "response", _RESPONSES)
    if response is None:
        raise BadRowError("unknown fields", f"a prompt without a response, found {sorted(map(str, row))[:8]}")
    before = _messages(prompt) if isinstance(prompt, (list, tuple)) else [{"role": "user", "content": prompt}]
    after = _messages(response) if isinstance(response, (list, tuple)) else None
    further = row.get("input") if "prompt" not in columns else None  # Alpaca: the instruction's own text
    if isinstance(further, str) and further.strip() and isinstance(prompt, str):
        before = [{"role": "user", "content": f"{prompt}\n\n{further}"}]
    system = _column(row, columns, "system", ("system", "system_prompt"))
    if isinstance(system, str) and system.strip():
        before.insert(0, {"role": "system", "content": system})
    return before + (after or [{"role": "assistant", "content": response}])


def _messages(chat: Any) -> list[Message]:
    if isinstance(chat, str) and chat.lstrip().startswith("["):  # some sets hold their messages as JSON text
        try:
            chat = json.loads(chat)
        except ValueError as error:
            raise BadRowError("not a list of messages", f"text that is no JSON: {error}") from error
    if not isinstance(chat, (list, tuple)):
        raise BadRowError("not a list of messages", f"found {type(chat).__name__}")
    result = []
    for number, message in enumerate(chat):
        if not isinstance(message, Mapping):
            raise BadRowError("not a list of messages", f"message {number} is {type(message).__name__}")
        name = message.get("role", message.get("from"))
        role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
        if role is None:
            raise BadRowError("unknown role", f"message {number} has {name!r}")
        content = message.get("content", message.get("value"))
        further = {key: message[key] for key in _KEPT if message.get(key) not in (None, [], "")}
        if name == "function_call":
            further["tool_calls"], content = _called(content, number), ""
        result.append({"role": role, "content": _text(content, number, further), **further})
    return result


def _called(content: Any, number: int) -> list[Any]:
    try:
        calls = json.loads(content) if isinstance(content, str) else content
    except ValueError as error:
        raise BadRowError("invalid tool call", f"message {number}: {error}") from error
    return [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]


def _text(content: Any, number: int, further: Message) -> str:
    if isinstance(content, (list, tuple)):  # parts
        kinds = [part.get("type") if isinstance(part, Mapping) else None for part in content]
        if kinds != ["text"] * len(kinds):
            raise BadRowError("not text", f"message {number} has parts {kinds[:4]}")
        content = "".join(str(part.get("text") or "") for part in content)
    if content is None and "tool_calls" in further:
        return ""
    if not isinstance(content, str):
        raise BadRowError("not text", f"content of message {number} is {type(content).__name__}")
    try:
        content.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, from a bad \\u escape
        raise BadRowError("not UTF-8", f"message {number}: {error.reason}") from error
    return content


def _turns(messages: list[Message], tools: Tools) -> list[Message]:
    """The order of turns that a template can render: system first, then user and assistant in turn."""
    if tools == "drop":
        messages = [m for m in messages if m["role"] != "tool" and "tool_calls" not in m]
    while messages and messages[-1]["role"] != "assistant":
        messages = messages[:-1]  # a question without an answer teaches nothing
    before = "start"
    for number, message in enumerate(messages):
        role = message["role"]
        if role == "system" and number:
            raise BadRowError("system turn in the middle", f"message {number}")
        if role == "assistant" and before in ("start", "system"):
            raise BadRowError("begins with the assistant", f"message {number}")
        if role == before and role != "tool":
            raise BadRowError(f"two {role} turns in a row", f"messages {number - 1} and {number}")
        if role == "tool" and before not in ("assistant", "tool"):
            raise BadRowError("tool turn without a call", f"message {number}")
        if role in ("user", "assistant") and "tool_calls" not in message and not message["content"].strip():
            raise BadRowError("empty content", f"message {number}, {role}")
        before = role
    if not messages:
        raise BadRowError("no assistant turn")
    return messages


def _described(tools: Any) -> tuple[Any, ...]:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else []
        except ValueError as error:
            raise BadRowError("invalid tools", str(error)) from error
    return tuple(tools) if isinstance(tools, (list, tuple)) else ()


def _digest(messages: tuple[Message, ...], text: str | None) -> str:
    return digest(text if text is not None else json.dumps(messages, sort_keys=True, ensure_ascii=False))
