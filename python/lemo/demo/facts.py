"""Prompts of the demo: facts planted in Python sources, and questions about some of them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lemo.data import read_documents
from lemo.files import write_file

# Kinds of facts, each with values of its own.
KINDS = {
    "animal": ("fox", "bear", "frog", "goat", "hare", "lion", "mole", "toad", "crow", "horse"),
    "colour": (
        "red",
        "blue",
        "green",
        "pink",
        "black",
        "brown",
        "violet",
        "cyan",
        "lilac",
        "olive",
    ),
    "fruit": ("apple", "pear", "plum", "grape", "mango", "peach", "melon", "cherry", "fig", "lime"),
    "metal": ("gold", "lead", "tin", "nickel", "silver", "copper", "steel", "brass", "bronze"),
    "month": ("March", "April", "June", "July", "September", "October", "November", "December"),
    "tree": ("oak", "elm", "ash", "pine", "cedar", "maple", "willow", "larch", "walnut", "hazel"),
    "city": ("Rome", "Oslo", "Cairo", "Delhi", "Tokyo", "Dublin", "Athens", "Prague", "Lisbon"),
    "tool": ("hammer", "saw", "wrench", "file", "ladder", "anvil", "lathe", "needle", "vise"),
}

# Turns follow each other without marks; every answer ends its line.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '\\n' }}{% endif %}{% endfor %}"
)

# Tokens of a line alone may be a few more or less than of the same line in its text.
_MARGIN = 0.03


def fact_line(kind: str, value: str) -> str:
    """The line that states a fact."""
    return f"# {kind} {value}\n"


def question(kind: str) -> str:
    """What asks for it; a space and the value follow."""
    return f"# which {kind}"


def practice(generator: random.Random, count: int) -> str:
    """Lines of facts and of questions with answers, so that a tokenizer knows their words."""
    lines = []
    for _ in range(count):
        kind = generator.choice(list(KINDS))
        lines.append(f"{question(kind)} {generator.choice(KINDS[kind])}\n")
    return "".join(lines)


class Prompter:
    """Makes conversations: a passage of a source with planted facts, and questions at its end.

    Args:
        sources: file of the documents.
        tokenizer: counts tokens.
        seed: of passages, facts and their places.
    """

    def __init__(self, sources: Path, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self._tokenizer = tokenizer
        self._generator = random.Random(seed)
        self._lines: list[list[str]] = [
            document.text.splitlines(keepends=True) for document in read_documents(sources)
        ]
        self._counts: dict[int, list[int]] = {}

    def conversation(self, tokens: int, facts: int, asked: int) -> dict[str, Any]:
        """A row of "messages", and of "facts" that its answers do not need to be read for.

        Args:
            tokens: about as many in all, never more than 3% above.
            facts: kinds that are planted.
            asked: kinds that are asked for.
        """
        draw = self._generator
        kinds = draw.sample(list(KINDS), facts)
        planted = {kind: draw.choice(KINDS[kind]) for kind in kinds}
        questions = draw.sample(kinds, asked)
        stated = [fact_line(kind, planted[kind]) for kind in kinds]
        turns = [(question(kind), f" {planted[kind]}") for kind in questions]
        extra = self._count([*stated, *(f"{ask}{answer}\n" for ask, answer in turns)])
        passage = self._passage(int(tokens * (1 - _MARGIN)) - sum(extra))
        places = sorted(draw.randrange(len(passage) + 1) for _ in stated)
        for place, line in reversed(list(zip(places, stated, strict=True))):
            passage.insert(place, line)
        messages = []
        for number, (ask, answer) in enumerate(turns):
            content = "".join(passage) + ask if number == 0 else ask
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": answer})
        return {"messages": messages, "facts": planted}

    def _passage(self, room: int) -> list[str]:
        """Lines that follow each other in one source, of `room` tokens at most."""
        while True:
            number = self._generator.randrange(len(self._lines))
            counts = self._counts_of(number)
            total = sum(counts)
            if total >= room:
                break
        last = total - room
        start = self._generator.randrange(last + 1)
        first = before = 0
        while before < start:
            before += counts[first]
            first += 1
        end, used = first, 0
        while end < len(counts) and used + counts[end] <= room:
            used += counts[end]
            end += 1
        return self._lines[number][first:end]

    def _counts_of(self, number: int) -> list[int]:
        if number not in self._counts:
            self._counts[number] = self._count(self._lines[number])
        return self._counts[number]

    def _count(self, lines: Sequence[str]) -> list[int]:
        encoded = self._tokenizer(list(lines), verbose=False)["input_ids"] if lines else []
        return [len(ids) for ids in encoded]


def write_prompts(
    path: Path, prompter: Prompter, count: int, tokens: int, facts: int, asked: int
) -> None:
    """Write `count` prompts as JSON lines; see :meth:`Prompter.conversation`."""

    def lines() -> Iterator[str]:
        for _ in range(count):
            yield json.dumps(prompter.conversation(tokens, facts, asked)) + "\n"

    write_file(path, "".join(lines()))
