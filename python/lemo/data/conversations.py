"""Conversations in the forms that people keep them in: what is a prompt, what is an answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lemo.data.rows import Row, keys_of

__all__ = ["FORMS", "THOUGHTS", "Conversation", "Prompted", "check_text", "parse_example"]

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
# Roles whose text is a call of a tool, as JSON.
_CALLS = ("function_call", "tool_call")
_PREFERENCES = ("chosen", "rejected")
# What different templates call a thought.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
# Lists of objects for chat templates, and what else is for them alone.
_LISTS = ("tools", "documents", "functions")
_BESIDE = ("system", *_LISTS)
_LONGEST_SHOWN = 200  # characters of a value in a message


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages for a chat template; the assistant's are the answers.

    Attributes:
        messages: {"role", "content", ...} each; what else a message holds goes to the template.
        place: file and line, for messages of errors.
        name: a short name of the example.
        extra: further variables of the template, such as `tools`.
        context: numbers of the assistant's messages that are not trained on.
    """

    messages: tuple[dict[str, Any], ...]
    place: str
    name: str
    extra: dict[str, Any] = field(default_factory=dict)
    context: frozenset[int] = frozenset()


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
    {"role", "content"} or ShareGPT's {"from", "value"}, with `system`, `tools` and
    `chat_template_kwargs` beside them); `prompt` and `completion` (two texts, or two lists of
    messages); `instruction`, `input` and `output` (a user's message and its answer, after earlier
    pairs in `history`); `text`. Lists, objects and what is in lists may be given as JSON texts.

    All messages of the assistant are answers, but for those inside a `prompt`, and those with a
    `weight` of 0 or `train` false.

    Raises:
        ValueError: none of these, preference data, a message without a role or text, an empty
            answer, no answer, `system` or `tools` beside texts. The message names file, line, what
            was expected and the keys that are there.
    """
    record = {name: value for name, value in row.record.items() if value is not None}
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
    raise ValueError(f"{row.place}: expected {FORMS}, got {keys_of(row.record)}")


def _conversation(
    row: Row, messages: list[dict[str, Any]], context: Iterable[int] = ()
) -> Conversation:
    """The conversation of some messages, of which those of the numbers `context` are no answers."""
    told = _with_system(row, messages)
    answers = [n for n, message in enumerate(told) if message["role"] == "assistant"]
    if not answers:
        roles = ", ".join(dict.fromkeys(message["role"] for message in told))
        raise ValueError(
            f"{row.place}: expected a message of the assistant, got messages of {roles} only"
        )
    added = len(told) - len(messages)
    left_out = {number + added for number in context}
    for number, message in enumerate(told):
        if not _take_weight(row, number, message) and number in answers:
            left_out.add(number)
        if number in answers and number not in left_out and not _says_something(message):
            raise ValueError(
                f"{row.place}: expected message {number - added} (assistant) to have an answer, "
                "got an empty 'content'; leave it out, or give it a 'weight' of 0"
            )
    if left_out.issuperset(answers):
        raise ValueError(
            f"{row.place}: expected an answer to train on, got none but in the prompt or with a "
            "'weight' of 0"
        )
    return Conversation(tuple(told), row.place, row.name, _extra(row), frozenset(left_out))


def _with_system(row: Row, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages, with the row's `system` in front where it has one."""
    system = row.record.get("system") or ""
    if not isinstance(system, str):
        raise ValueError(
            f"{row.place}: expected 'system' to be a text, got {type(system).__name__}"
        )
    check_text(row.place, "system", system)
    first = messages[0]
    if system and first["role"] not in ("system", "developer"):
        return [{"role": "system", "content": system}, *messages]
    if system and first["content"].strip() != system.strip():
        raise ValueError(
            f"{row.place}: expected one system message, got 'system' and another one at the "
            "beginning of the messages"
        )
    return messages


def _take_weight(row: Row, number: int, message: dict[str, Any]) -> bool:
    """Takes out of a message what says whether it is trained on; whether it is."""
    weight, train = message.pop("weight", 1), message.pop("train", True)
    if weight not in (0, 1) or train not in (True, False):
        raise ValueError(
            f"{row.place}: expected message {number} to have a 'weight' of 0 or 1 and a "
            f"'train' of true or false, got {_shown(weight)} and {_shown(train)}"
        )
    return bool(weight and train)


def _extra(row: Row) -> dict[str, Any]:
    """Further variables of the template."""
    record = row.record
    found: dict[str, Any] = {name: _objects(row, name) for name in _LISTS if record.get(name)}
    # Templates write of tools that are given, also where the list is empty.
    extra = {name: value for name, value in found.items() if value}
    functions = [{"type": "function", "function": each} for each in extra.pop("functions", ())]
    if functions:
        # OpenAI's older form.
        extra.setdefault("tools", functions)
    settings = _parsed(record.get("chat_template_kwargs") or {})
    if not isinstance(settings, Mapping):
        raise ValueError(
            f"{row.place}: expected 'chat_template_kwargs' to be an object, got {_shown(settings)}"
        )
    return extra | dict(settings)


def _objects(row: Row, name: str) -> list[Any]:
    value = _parsed(row.record[name])
    value = [_parsed(each) for each in value] if isinstance(value, list) else value
    if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
        raise ValueError(
            f"{row.place}: expected '{name}' to be a list of objects, got {_shown(value)}"
        )
    return value


def _parsed(value: Any) -> Any:
    """A list or object that is given as a JSON text, as tables hold them; else the value."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _messages(row: Row, name: str, value: Any) -> list[dict[str, Any]]:
    value = _parsed(value)
    if not isinstance(value, list | tuple) or not value:
        texts = "a text or " if name in ("prompt", "completion") else ""
        raise ValueError(
            f"{row.place}: expected '{name}' to be {texts}a list of messages, got {_shown(value)}"
        )
    return [_message(row, f"{name}[{number}]", entry) for number, entry in enumerate(value)]


def _message(row: Row, where: str, entry: Any) -> dict[str, Any]:
    entry = _parsed(entry)
    if not isinstance(entry, Mapping):
        raise ValueError(f"{row.place}: expected {where} to be an object, got {_shown(entry)}")
    message = {name: value for name, value in entry.items() if value is not None}
    if "role" not in message and "from" in message:
        message["role"] = message.pop("from")
    if "content" not in message and "value" in message:
        message["content"] = message.pop("value")
    role = message.get("role")
    if role in _CALLS:
        called = _parsed(message.pop("content", None))
        message["tool_calls"] = called if isinstance(called, list) else [called]
        role = "assistant"
    role = _ROLES.get(role, role) if isinstance(role, str) else role
    if role not in _KNOWN_ROLES:
        known = ", ".join((*_KNOWN_ROLES, *_ROLES, *_CALLS))
        raise ValueError(
            f"{row.place}: expected {where} to have a role (one of {known}), got "
            + (_shown(role) if role is not None else keys_of(message))
        )
    if "function_call" in message:
        message["tool_calls"] = [message.pop("function_call"), *message.get("tool_calls", [])]
    calls = _parsed(message.pop("tool_calls", None))
    if calls:
        message["tool_calls"] = _tool_calls(row, where, calls)
    content = message.get("content")
    if content is None and "tool_calls" in message:
        content = ""
    if isinstance(content, list | tuple):
        content = _joined(row, where, content)
    if not isinstance(content, str):
        raise ValueError(
            f"{row.place}: expected {where} to have a text 'content', got "
            + (keys_of(message) if content is None else type(content).__name__)
        )
    check_text(row.place, where, content)
    return message | {"role": role, "content": content}


def _shown(value: Any) -> str:
    """A value in a message, which may be a whole conversation: its beginning."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _says_something(message: Mapping[str, Any]) -> bool:
    """Whether a message has a content, a call or a thought."""
    more = any(message.get(name) for name in ("tool_calls", *THOUGHTS))
    return more or bool(message["content"].strip())


def _tool_calls(row: Row, where: str, calls: Any) -> list[dict[str, Any]]:
    """Calls as chat templates expect them, with arguments that are objects where they can be."""
    made = []
    for call in map(_parsed, calls if isinstance(calls, list | tuple) else [calls]):
        function = call.get("function", call) if isinstance(call, Mapping) else call
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            raise ValueError(
                f"{row.place}: expected {where} to call functions by 'name' and 'arguments', got "
                f"{_shown(call)}"
            )
        function = dict(function) | {"arguments": _parsed(function.get("arguments") or {})}
        rest = dict(call) if "function" in call else {}
        made.append({"type": "function"} | rest | {"function": function})
    return made


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
    prompt, completion = (_parsed(row.record[name]) for name in ("prompt", "completion"))
    good = row.record.get("label")
    if isinstance(good, bool) or str(good).lower() in ("true", "false"):
        raise ValueError(
            f"{row.place}: expected examples to imitate, got preference data (a 'label' says "
            "whether the completion is wanted); keep the wanted ones, and leave 'label' out"
        )
    # A text that is JSON by chance is a text.
    prompt = prompt if _is_messages(prompt) else row.record["prompt"]
    completion = completion if _is_messages(completion) else row.record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        for name, text in (("prompt", prompt), ("completion", completion)):
            check_text(row.place, name, text)
        if not completion.strip():
            raise ValueError(f"{row.place}: expected 'completion' to be a text, got an empty one")
        beside = [f"'{name}'" for name in _BESIDE if _parsed(row.record.get(name))]
        if beside:
            raise ValueError(
                f"{row.place}: expected nothing for a chat template beside a 'prompt' and a "
                f"'completion' that are texts, which have none, got {', '.join(beside)}; put it "
                "into the prompt, or give lists of messages"
            )
        return Prompted(prompt, completion, row.place, row.name)
    asked, answered = (
        _messages(
            row, name, [{"role": role, "content": value}] if isinstance(value, str) else value
        )
        for name, value, role in (
            ("prompt", prompt, "user"),
            ("completion", completion, "assistant"),
        )
    )
    context = [n for n, message in enumerate(asked) if message["role"] == "assistant"]
    return _conversation(row, asked + answered, context)


def _is_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(entry, Mapping) and {"role", "from"} & set(entry) for entry in value)
    )


def _instruction(row: Row) -> Conversation:
    record = row.record
    texts = {name: record.get(name) or "" for name in ("instruction", "input", "output")}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(
                f"{row.place}: expected '{name}' to be a text, got {type(text).__name__}"
            )
        check_text(row.place, name, text)
    if not texts["output"].strip():
        raise ValueError(f"{row.place}: expected 'output' to be a text, got an empty one")
    history = _parsed(record.get("history") or [])
    pairs = isinstance(history, list | tuple) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in history
    )
    if not pairs:
        raise ValueError(
            f"{row.place}: expected 'history' to be a list of pairs of texts, got {_shown(history)}"
        )
    asked = "\n\n".join(text for text in (texts["instruction"], texts["input"]) if text)
    turns = [*history, (asked, texts["output"])]
    entries = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn)
    ]
    return _conversation(row, _messages(row, "history", entries))


def check_text(place: str, where: str, text: str) -> None:
    """ValueError where a text is none that UTF-8 has."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{place}: {where} holds half of a surrogate pair") from None
