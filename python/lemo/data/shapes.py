"""What a chat template writes around the texts of a conversation, whatever these are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Shape", "Span", "StandIn", "with_stand_ins"]

Span = tuple[int, int]

# Around the number of a stand-in; in no message.
_MARK = "\U000f1e10"


@dataclass(frozen=True, slots=True)
class StandIn:
    """A text of its own in the place of a content or of the name of a function that is called.

    Attributes:
        text: the stand-in.
        original: what it stands for.
        what: a description of it, for errors.
    """

    text: str
    original: str
    what: str


def with_stand_ins(
    messages: Sequence[dict[str, Any]], answers_only: bool = False
) -> tuple[list[dict[str, Any]], list[StandIn]]:
    """Messages in which each content and each call is replaced, and by what."""
    made, found, count = [], [], 0
    for number, message in enumerate(messages):
        other, parts = dict(message), []
        if message["content"].strip():
            stand_in = StandIn(
                _text(count), message["content"], f"message {number} ({message['role']})"
            )
            other["content"] = stand_in.text
            parts.append(stand_in)
        if "tool_calls" in message:
            other["tool_calls"] = []
            for call in message["tool_calls"]:
                name = call["function"]["name"]
                stand_in = StandIn(_text(count + len(parts)), name, f"'tool_calls' (of '{name}')")
                function = call["function"] | {"name": stand_in.text}
                other["tool_calls"].append(call | {"function": function})
                parts.append(stand_in)
        # Of the same message always the same: a stand-in's own is itself.
        count += len(parts)
        if answers_only and message["role"] != "assistant":
            made.append(dict(message))
        else:
            made.append(other)
            found += parts
    return made, found


def _text(number: int) -> str:
    return f"{_MARK}{number}{_MARK}"


class Shape:
    """The texts around the stand-ins of a conversation, and where its answers are.

    Templates mostly write the same around any texts. Where they have done so, the answers are where
    they are among the stand-ins, and need not be looked for in each conversation.

    Attributes:
        text: what the template makes of the messages with stand-ins.
        usable: false where a stand-in is shown twice, or answers could not be found.
        learned: whether the answers have been found.

    Args:
        text: see above; each stand-in is in it.
        stand_ins: those of the messages.
    """

    def __init__(self, text: str, stand_ins: Sequence[StandIn]) -> None:
        self.text = text
        self.usable = text.count(_MARK) == 2 * len(stand_ins)
        self.learned = False
        starts = [text.index(stand_in.text) for stand_in in stand_ins]
        self._order = sorted(range(len(starts)), key=starts.__getitem__)
        ends = [starts[n] + len(stand_ins[n].text) for n in self._order]
        # What is between the stand-ins, in front of the first and behind the last.
        self._parts = list(zip([0, *ends], [*sorted(starts), len(text)]))
        self._texts = [text[start:end] for start, end in self._parts]
        self._answers: list[tuple[Span, Span]] = []

    def places(self, text: str, stand_ins: Sequence[StandIn]) -> list[int] | None:
        """Where in a text the parts around its contents begin; None: it is not of this shape.

        Args:
            text: what the template makes of a conversation.
            stand_ins: of this conversation.
        """
        places, at = [], 0
        for part, number in zip(self._texts, [*self._order, None]):
            if not text.startswith(part, at):
                return None
            places.append(at)
            at += len(part)
            if number is not None:
                original = stand_ins[number].original
                # Many templates leave out the white space around a content.
                shown = original if text.startswith(original, at) else original.strip()
                if not text.startswith(shown, at):
                    return None
                at += len(shown)
        return places if at == len(text) else None

    def learn(self, spans: Iterable[Span]) -> None:
        """Takes where the answers are among the stand-ins.

        Raises:
            ValueError: one begins or ends within a stand-in.
        """
        self._answers = [(self._border(start), self._border(end)) for start, end in spans]
        self.learned = True

    def spans(self, text: str, places: Sequence[int]) -> list[Span] | None:
        """Where the answers are in a text whose parts begin at `places`; None: this is not known.

        It is not where white space ends an answer, which may belong to it or not.
        """
        found = [(places[a] + x, places[b] + y) for (a, x), (b, y) in self._answers]
        behind = (end for (_, end), (_, (_, y)) in zip(found, self._answers) if y == 0)
        return None if any(text[end - 1].isspace() for end in behind) else found

    def _border(self, at: int) -> Span:
        """(number of a part, place in it)."""
        for number, (start, end) in enumerate(self._parts):
            if start <= at <= end:
                return number, at - start
        raise ValueError(f"expected a place around the stand-ins, got {at}")
