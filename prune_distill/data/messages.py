"""Read the messages and tools of a record, in the spellings of public datasets, as chat templates take them."""

from __future__ import annotations

import json
from typing import Any

Message = dict[str, Any]
FIELDS = {"role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name"}
# Roles in ShareGPT's spelling, `{"from": ..., "value": ...}`.
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}


class ConversationError(ValueError):
    """What is wrong with a record."""


def read_messages(value: Any) -> list[Message]:
    """Return the messages of a record: each with `role` and `content`, and no field that is null.

    `value` is a list of messages, or its JSON. Parquet files contain each field of any message in all of them, as null.

    Raises:
        ConversationError: it is not a conversation; with the number of the message, counted from 1.
    """
    value = _parse(value)
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ConversationError(f"the document is of type {type(value).__name__}, not a list of messages")
    return [_read_message(message, number) for number, message in enumerate(value, start=1)]


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """Return the tools of a record, JSON schemas; None: there are none. `value` is a list, or its JSON.

    Raises:
        ConversationError: it is something else.
    """
    value = _parse(value) or None
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ConversationError(f"the field 'tools' is of type {type(value).__name__}, not a list of JSON schemas")
    return value


def prompt_messages(messages: list[Message]) -> list[Message]:
    """Return the messages before the last one of the assistant; all, if they end with another's.

    Raises:
        ConversationError: nothing comes before it.
    """
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    prompt = messages[: turns[-1]] if turns and turns[-1] == len(messages) - 1 else messages
    if not prompt:
        raise ConversationError("there is no message before the assistant's")
    return prompt


def _parse(value: Any) -> Any:
    """Parse a field that holds JSON as a string, as columns of parquet files do; return others unchanged."""
    if not isinstance(value, (str, bytes)) or not value.strip():
        return None if isinstance(value, (str, bytes)) else value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _read_message(found: Message, number: int) -> Message:
    message = {name: value for name, value in found.items() if value is not None}
    if "role" not in message and "from" in message:
        role = message.pop("from")
        message = {**message, "role": SHAREGPT_ROLES.get(role, role), "content": message.pop("value", None)}
    role = message.get("role")
    if not isinstance(role, str):
        raise ConversationError(f"message {number} has no role, only {', '.join(sorted(map(str, found))) or 'nothing'}")
    where = f"message {number}, of the role {role!r},"
    content = message.get("content")
    if role == "tool" and not isinstance(content, (str, list)) and content is not None:
        content = json.dumps(content, ensure_ascii=False)  # a result as an object
    message["content"] = _read_content(content, where)
    if not message.get("reasoning_content"):
        message.pop("reasoning_content", None)
    elif not isinstance(message["reasoning_content"], str):
        raise ConversationError(f"{where} has reasoning_content that is not a string")
    calls = message.pop("tool_calls", None)
    if calls:
        message["tool_calls"] = _read_calls(calls, where)
    if not message["content"].strip() and not {"tool_calls", "reasoning_content"} & set(message) and role != "tool":
        raise ConversationError(f"{where} is empty")
    return message


def _read_content(content: Any, where: str) -> str:
    """Return the text of a message; several parts of text are joined."""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text") or "") for part in content)
    if content is not None and not isinstance(content, str):
        raise ConversationError(f"{where} has content of type {type(content).__name__}, not a text")
    return content or ""


def _read_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Return tool calls with their arguments as an object, which templates write as JSON, as servers do."""
    calls = _parse(calls)
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise ConversationError(f"{where} has tool_calls that are not a list")
    return [_read_call(call, where) for call in calls]


def _read_call(found: dict[str, Any], where: str) -> dict[str, Any]:
    call = {name: value for name, value in found.items() if value is not None}
    # Some files contain the function without its frame.
    function = call.pop("function", None) or {name: call.pop(name) for name in ("name", "arguments") if name in call}
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ConversationError(f"{where} has a tool call without the name of a function")
    arguments = _parse(function.get("arguments"))
    if not isinstance(arguments, dict):
        arguments = function.get("arguments") or {}
    return {"type": "function", **call, "function": {**function, "arguments": arguments}}
