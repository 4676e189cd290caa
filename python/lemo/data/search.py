"""Where the answers of a conversation are in the text that a chat template makes of it."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Protocol

from lemo.data.conversations import THOUGHTS, Conversation
from lemo.data.shapes import Span

__all__ = ["AnswerSearch", "answer_numbers", "not_found", "thought_of"]

# A text that no message begins with.
_UNSEEN = "\U000f1e0f"


class _Render(Protocol):
    def __call__(self, messages: Any, /, header: bool = False) -> str: ...


class AnswerSearch:
    """Looks for the answers of one conversation.

    Each answer is found by what comes before it: the text of the messages so far with the header of
    an answer is the beginning of the whole text, and the answer, with the token that ends it,
    follows there. Some templates write earlier messages otherwise than the last one (without
    thoughts). Then an answer begins behind the first header that follows the messages before it,
    and ends with the same token, before the next message.

    Args:
        example: the conversation.
        text: what the template makes of it.
        render: what the template makes of other messages, with the header of an answer to come
            where that is asked for.
        special: the texts of special tokens.
    """

    def __init__(
        self, example: Conversation, text: str, render: _Render, special: Collection[str]
    ) -> None:
        self._example = example
        self._text = text
        self._render = render
        self._special = special

    def spans(self) -> Iterator[Span]:
        """The answers, each with the token that ends it, and perhaps white space behind.

        Raises:
            ValueError: one is not found; the message names file and line.
        """
        numbers = answer_numbers(self._example)
        starts: list[int] = []
        for number, before in zip(numbers, [0, *numbers]):
            starts.append(self._start(number, before, starts[-1] if starts else 0))
        messages = self._example.messages
        for number, start, behind in zip(numbers, starts, [*starts[1:], len(self._text)]):
            last = number + 1 == len(messages)
            through = self._text if last else self._render(messages[: number + 1])
            if self._text.startswith(through):
                yield start, len(through)
            else:
                yield start, self._end(number, start, behind, through)

    def _start(self, number: int, before: int, begin: int) -> int:
        """Where the answer of message `number` begins.

        The answer before it is message `before` and begins at `begin`; both are 0 for the first.
        """
        if number == 0:
            return self._start_of_first()
        asked = self._render(self._example.messages[:number], header=True)
        if self._text.startswith(asked):
            return len(asked)
        plain = self._render(self._example.messages[:number])
        if not asked.startswith(plain):
            raise not_found(self._example, number)
        # The header may say more than those of earlier answers have, such as the begin of thoughts.
        header = asked[len(plain) :]
        if self._text.startswith(plain):
            begin = len(plain)
            common = self._whole(header[: _common(self._text[begin:], header)])
            if common:
                return begin + common
            # It is further on where the last message ends otherwise than one that others follow.
            found = self._behind_header(number, header, begin)
            return begin if found is None else found
        if not header:
            # The template has no header for an answer to come.
            return self._behind(number)
        # Whatever contents say, it is no header. Beside calls some templates take no content.
        for other in range(before, number):
            if "tool_calls" in self._example.messages[other]:
                continue
            end = self._behind_content(other)
            if end is None:
                raise not_found(self._example, number)
            begin = max(begin, end)
        found = self._behind_header(number, header, begin)
        if found is None:
            raise not_found(self._example, number)
        return found

    def _behind_content(self, number: int) -> int | None:
        """Where the content of a message ends; None: the template does not show it as it is."""
        limit = self._limit(number)
        for content in _shown(self._example.messages[number]):
            found = self._text.find(content, limit)
            if found >= 0:
                return found + len(content)
        return None

    def _behind_header(self, number: int, header: str, begin: int) -> int | None:
        """Where the first header behind `begin` ends, or what earlier answers have of it.

        None: there is none in front of the content of message `number`.
        """
        limit = self._limit(number)
        while header:
            at = self._text.find(header, begin, limit)
            if at >= 0:
                return at + len(header)
            header = header[: self._whole(header[:-1])]
        return None

    def _start_of_first(self) -> int:
        """Where an answer begins that no message comes before, of which templates make no text."""
        limit = self._limit(0)
        _, _, header = self._render(self._example.messages, header=True).partition(self._text)
        found = self._text.find(header, 0, limit) if header else -1
        if found >= 0:
            return found + len(header)
        if limit == len(self._text) or thought_of(self._example.messages[0]):
            raise not_found(self._example, 0)
        return limit

    def _whole(self, header: str) -> int:
        """Length of a part of a header up to where a special token or white space ends."""
        ends = [header.rfind(token) + len(token) for token in self._special if token in header]
        return max([0, *ends, *(n for n, c in enumerate(header, start=1) if c.isspace())])

    def _end(self, number: int, start: int, behind: int, through: str) -> int:
        """Where an answer ends that is written otherwise where more messages follow.

        It begins at `start`, and the next answer at `behind`.
        """
        later = range(number + 1, len(self._example.messages))
        # Some templates gather messages, such as all of the system, in front of the others.
        limits = (self._limit(other) for other in later)
        limit = next((limit for limit in limits if limit > start), 0)
        if limit == len(self._text):
            raise not_found(self._example, number)
        limit = min(limit or len(self._text), behind)
        ending = through[: len(through.rstrip())]
        token = max((t for t in self._special if ending.endswith(t)), key=len, default="")
        found = self._text.rfind(token, start, limit) if token else -1
        if found >= 0:
            return found + len(token)
        for content in filter(None, _shown(self._example.messages[number])):
            found = self._text.find(content, start, limit)
            if found >= 0:
                end = found + len(content)
                return end + self._special_length(self._text[end:limit])
        raise not_found(self._example, number)

    def _behind(self, number: int) -> int:
        """Where message `number` begins: behind what follows the content of the one before it."""
        messages = list(self._example.messages)
        messages[number - 1] = messages[number - 1] | {"content": _UNSEEN}
        _, shown, closing = self._render(messages[:number]).rpartition(_UNSEEN)
        _, _, rest = self._render(messages).rpartition(_UNSEEN)
        if not (shown and rest.startswith(closing) and self._text.endswith(rest)):
            raise not_found(self._example, number)
        return len(self._text) - len(rest) + len(closing)

    def _limit(self, number: int) -> int:
        """A place in the header of message `number`, or where its content begins.

        The end of the text where there is no such message, or the template does not show it.
        """
        messages = list(self._example.messages)
        if number == len(messages):
            return len(self._text)
        messages[number] = messages[number] | {"content": _UNSEEN}
        other = self._render(messages)
        return _common(self._text, other)

    def _special_length(self, text: str) -> int:
        """Length of the special token, after white space, that a text begins with; 0: none."""
        skipped = len(text) - len(text.lstrip())
        found = [token for token in self._special if text.startswith(token, skipped)]
        return skipped + max(map(len, found)) if found else 0


def answer_numbers(example: Conversation) -> list[int]:
    """Numbers of the assistant's messages."""
    return [n for n, message in enumerate(example.messages) if message["role"] == "assistant"]


def not_found(example: Conversation, number: int) -> ValueError:
    """The error of an answer that is not found."""
    return ValueError(
        f"{example.place}: the answer of message {number} is not found in what the chat "
        "template makes of the messages; use a template with generation marks"
    )


def thought_of(message: Mapping[str, Any]) -> str:
    """The thought of a message, which templates put in front of its content; empty: it has none."""
    before, mark, _ = message["content"].partition("</think>")
    if mark:
        return str(before.rpartition("<think>")[2].strip())
    given = (message.get(name) for name in THOUGHTS)
    return next((thought.strip() for thought in given if isinstance(thought, str)), "")


def _shown(message: Mapping[str, Any]) -> tuple[str, ...]:
    """What a template may show of a content: all of it, what is behind its thought, or JSON."""
    content = message["content"].strip()
    answer = content.rpartition("</think>")[2].strip()
    return content, answer, json.dumps(content, ensure_ascii=False)[1:-1]


def _common(first: str, second: str) -> int:
    """Characters that two texts begin with alike."""
    alike, limit = 0, min(len(first), len(second))
    while alike < limit:
        middle = (alike + limit + 1) // 2
        if first[alike:middle] == second[alike:middle]:
            alike = middle
        else:
            limit = middle - 1
    return alike
