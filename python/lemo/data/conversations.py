"""Conversations in the forms that people keep them in: what is a prompt, what is an answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lemo.data.rows import Row, keys_of

__all__ = ["Conversation", "Prompted", "parse_example"]

FORMS = (
    "'messages' (or 'conversations'), 'prompt' and 'completion', 'instruction' and 'output', "
    "or 'text'"
)

# How ShareGPT's files and those made in their manner call the roles of chat templates.
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function": "tool",
    "tool_response": "tool",
}
_KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")
_PREFERENCES = ("chosen", "rejected")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages for a chat template; the assistant's are the answers.

    Attributes:
        messages: {"role", "content", ...} each; what else a message holds goes to the template.
        place: file and line, for messages of errors.
        name: a short name of the example.
        extra: further variables of the template, such as `tools`.
    """

    messages: tuple[dict[str, Any], ...]
    place: str
    name: str
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prompted:
    """A plain text and its continuation, for no chat template.

    Attributes:
        prompt, completion: the texts; the completion is the answer.
        place, name: as of a conversation.
    """

    prompt: str
    completion: str
    place: str
    name: str


def parse_example(row: Row) -> Conversation | Prompted | None:
    """The example that a row holds; None: a plain `text`.

    Forms, in the order in which they are looked for: `messages` or `conversations` (a list of
    {"role", "content"} or ShareGPT's {"from", "value"}, with `system` and `tools` beside them);
    `prompt` and `completion` (two texts, or two lists of messages); `instruction`, `input` and
    `output` (a user's message and its answer); `text`.

    Raises:
        ValueError: none of these, preference data, a message without a role or text, no answer. The
            message names file, line, what was expected and the keys that are there.
    """
    record = row.record
    if any(name in record for name in _PREFERENCES):
        raise ValueError(
            f"{row.place}: expected examples to imitate, got preference data "
            f"({keys_of(record)}); keep the chosen answers, as 'messages' or 'prompt' and "
            "'completion'"
        )
    for name in ("messages", "conversations"):
        if name in record:
            return _conversation(row, _messages(row, name, record[name]))
    if "prompt" in record and "completion" in record:
        return _prompted(row)
    if "instruction" in record and "output" in record:
        return _instruction(row)
    if "text" in record:
        return None
    raise ValueError(f"{row.place}: expected {FORMS}, got {keys_of(record)}")


def _conversation(row: Row, messages: list[dict[str, Any]]) -> Conversation:
    system = row.record.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        raise ValueError(
            f"{row.place}: expected a message of the assistant, got messages of {roles} only"
        )
    extra = {name: row.record[name] for name in ("tools", "documents") if row.record.get(name)}
    return Conversation(tuple(messages), row.place, row.name, extra)


def _messages(row: Row, name: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{row.place}: expected '{name}' to be a list of messages, got {value!r}")
    return [_message(row, f"{name}[{number}]", entry) for number, entry in enumerate(value)]


def _message(row: Row, where: str, entry: Any) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{row.place}: expected {where} to be an object, got {entry!r}")
    message = {name: value for name, value in entry.items() if value is not None}
    if "role" not in message and "from" in message:
        message["role"] = message.pop("from")
    if "content" not in message and "value" in message:
        message["content"] = message.pop("value")
    role = message.get("role")
    role = _ROLES.get(role, role) if isinstance(role, str) else role
    if role not in _KNOWN_ROLES:
        known = ", ".join((*_KNOWN_ROLES, *_ROLES))
        raise ValueError(
            f"{row.place}: expected {where} to have a role (one of {known}), got "
            + (repr(role) if role is not None else keys_of(message))
        )
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""
    if isinstance(content, list | tuple):
        content = _joined(row, where, content)
    if not isinstance(content, str):
        raise ValueError(
            f"{row.place}: expected {where} to have a text 'content', got "
            + (keys_of(message) if content is None else type(content).__name__)
        )
    _check_text(row, where, content)
    return message | {"role": role, "content": content}


def _joined(row: Row, where: str, parts: list[Any] | tuple[Any, ...]) -> str:
    """The text of a message that is given in parts."""
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind != "text" or not isinstance(text, str):
            raise ValueError(f"{row.place}: expected {where} to be text, got a part '{kind}'")
        texts.append(text)
    return "".join(texts)


def _prompted(row: Row) -> Conversation | Prompted:
    prompt, completion = row.record["prompt"], row.record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        for name, text in (("prompt", prompt), ("completion", completion)):
            _check_text(row, name, text)
        if not completion:
            raise ValueError(f"{row.place}: expected 'completion' to be a text, got an empty one")
        return Prompted(prompt, completion, row.place, row.name)
    messages = [
        message
        for name, value, role in (
            ("prompt", prompt, "user"),
            ("completion", completion, "assistant"),
        )
        for message in _messages(
            row, name, [{"role": role, "content": value}] if isinstance(value, str) else value
        )
    ]
    return _conversation(row, messages)


def _instruction(row: Row) -> Conversation:
    record = row.record
    texts = {name: record.get(name, "") for name in ("instruction", "input", "output")}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(
                f"{row.place}: expected '{name}' to be a text, got {type(text).__name__}"
            )
        _check_text(row, name, text)
    asked = "\n\n".join(text for text in (texts["instruction"], texts["input"]) if text)
    user = {"role": "user", "content": asked}
    return _conversation(row, [user, {"role": "assistant", "content": texts["output"]}])


def _check_text(row: Row, where: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{row.place}: {where} holds half of a surrogate pair") from None
