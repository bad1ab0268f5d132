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
_THOUGHTS = ("reasoning_content", "thinking")
_KEPT = ("tool_calls", "tool_call_id", "name", *_THOUGHTS)


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
        if self.text is not None:
            return digest(self.text)
        said = [self.messages, self.tools] if self.tools else self.messages
        return digest(json.dumps(said, sort_keys=True, ensure_ascii=False))

    @property
    def opening(self) -> str:
        """What decides on which side of a train/held-out split it falls: the first user turn, or the whole text.

        Conversations that open alike stay together, and a regenerated response changes nothing.
        """
        first = next((m["content"] for m in self.messages if m["role"] == "user"), self.text or "")
        return " ".join(str(first).split()).casefold()

    def texts(self) -> list[str]:
        """Everything that is said, or thought."""
        if self.text is not None:
            return [self.text]
        return [str(m[key]) for m in self.messages for key in ("content", *_THOUGHTS) if key in m]

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
        messages = _with_system(row, columns, _messages(chat))
        found = Conversation("", tuple(_turns(messages, tools)), tools=_described(described))
    elif (prompt := _column(row, columns, "prompt", _PROMPTS)) is not None:
        messages = _with_system(row, columns, _pair(row, columns, prompt))
        found = Conversation("", tuple(_turns(messages, tools)), tools=_described(described))
    elif (text := _column(row, columns, "text", ("text",))) is not None:
        if not isinstance(text, str):
            raise BadRowError("not text", f"text is {type(text).__name__}")
        _check_unicode(text, "text")
        if not text.strip():
            raise BadRowError("empty content", "text")
        found = Conversation("", text=text)
    else:
        expected = "messages, conversations, prompt and response, or text"
        raise BadRowError("unknown fields", f"found {sorted(map(str, row))[:8]}, expected {expected}")
    name = row.get(columns.get("id", "id"))
    usable = (
        isinstance(name, (str, int)) and not isinstance(name, bool) and str(name).strip() and str(name).isprintable()
    )
    return replace(found, id=str(name) if usable else found.content_digest)


def _column(row: Mapping[str, Any], columns: Mapping[str, str], kind: str, usual: tuple[str, ...]) -> Any:
    if kind in columns:
        if row.get(columns[kind]) is None and kind in ("messages", "prompt", "response", "text"):
            raise BadRowError("unknown fields", f"{columns[kind]!r} is missing, found {sorted(map(str, row))[:8]}")
        return row.get(columns[kind])
    if columns and kind in ("messages", "prompt", "text") and set(columns) & {"messages", "prompt", "text"}:
        return None  # another kind was named
    return next((row[name] for name in usual if row.get(name) not in (None, [])), None)


def _pair(row: Mapping[str, Any], columns: Mapping[str, str], prompt: Any) -> list[Message]:
    response = _column(row, columns, "response", _RESPONSES)
    if response is None:
        raise BadRowError("unknown fields", f"a prompt without a response, found {sorted(map(str, row))[:8]}")
    if "prompt" not in columns and isinstance(prompt, str):
        further = _column(row, {}, "input", ("input", "context"))  # Alpaca, Dolly: what the instruction is about
        if isinstance(further, str) and further.strip():
            prompt = f"{prompt}\n\n{further}"
    turns = [("user", prompt), ("assistant", response)]
    return [
        message
        for role, said in turns
        for message in _messages(said if isinstance(said, (list, tuple)) else [{"role": role, "content": said}])
    ]


def _with_system(row: Mapping[str, Any], columns: Mapping[str, str], messages: list[Message]) -> list[Message]:
    """The messages, after the system prompt of the row's own column where they bring none."""
    system = _column(row, columns, "system", ("system", "system_prompt"))
    if not isinstance(system, str) or not system.strip() or (messages and messages[0]["role"] == "system"):
        return messages
    return _messages([{"role": "system", "content": system}]) + messages


def _messages(chat: Any) -> list[Message]:
    if isinstance(chat, str) and chat.lstrip().startswith("["):  # some sets hold their messages as JSON text
        try:
            chat = json.loads(chat)
        except (ValueError, RecursionError) as error:
            raise BadRowError("not a list of messages", f"text that is no JSON: {error}") from error
    if isinstance(chat, Mapping):  # a list of structs, as `datasets` shows what it calls a Sequence
        fields = {name: value for name, value in chat.items() if isinstance(value, (list, tuple))}
        chat = [dict(zip(fields, message, strict=True)) for message in zip(*fields.values(), strict=False)] or chat
    if not isinstance(chat, (list, tuple)):
        raise BadRowError("not a list of messages", f"found {type(chat).__name__}")
    result = []
    for number, message in enumerate(chat):
        if not isinstance(message, Mapping):
            raise BadRowError("not a list of messages", f"message {number} is {type(message).__name__}")
        name = _first(message, "role", "from")
        role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
        if role is None:
            raise BadRowError("unknown role", f"message {number} has {name!r}")
        content = _first(message, "content", "value")
        further = {key: message[key] for key in _KEPT if message.get(key) not in (None, [], "")}
        if name == "function_call":
            further["tool_calls"], content = _called(content, number), ""
        for key in _THOUGHTS:
            if not isinstance(further.get(key, ""), str):
                raise BadRowError("not text", f"{key} of message {number} is {type(further[key]).__name__}")
        result.append({"role": role, "content": _text(content, number, further), **further})
        _check_unicode(result[-1], f"message {number}")
    return result


def _first(message: Mapping[str, Any], *names: str) -> Any:
    return next((message[name] for name in names if message.get(name) is not None), None)


def _check_unicode(said: Any, where: str) -> None:
    """Refuse half a surrogate pair, from a bad \\u escape, and values that JSON has no form for."""
    try:
        json.dumps(said, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise BadRowError("not UTF-8", f"{where}: {error.reason}") from error
    except (TypeError, RecursionError) as error:
        raise BadRowError("not text", f"{where}: {error}") from error


def _called(content: Any, number: int) -> list[Any]:
    try:
        calls = json.loads(content) if isinstance(content, str) else content
    except (ValueError, RecursionError) as error:
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
    return content


def _turns(messages: list[Message], tools: Tools) -> list[Message]:
    """The order of turns that a template can render: system first, then user and assistant in turn."""
    if tools == "drop":
        messages = [m for m in messages if m["role"] != "tool" and "tool_calls" not in m]
    system = messages[:1] if messages and messages[0]["role"] == "system" else []
    roles = [message["role"] for message in messages]
    if "user" not in roles or "assistant" not in roles:
        raise BadRowError("no user turn" if "assistant" in roles else "no assistant turn")
    first, last = len(system), len(roles) - roles[::-1].index("assistant")
    if roles[first] in ("assistant", "tool"):  # a chat that was cut in two: what it answers is not known
        first = roles.index("user")
    messages = system + messages[first:last]  # a question without an answer teaches nothing
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
    if before != "assistant":
        raise BadRowError("no assistant turn")
    return messages


def _described(tools: Any) -> tuple[Any, ...]:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else []
        except (ValueError, RecursionError) as error:
            raise BadRowError("invalid tools", str(error)) from error
    _check_unicode(tools, "tools")
    return tuple(tools) if isinstance(tools, (list, tuple)) else ()
