"""From a conversation to ids and labels, by the tokenizer's chat template."""

from __future__ import annotations

import json
import logging
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from itertools import chain, groupby
from typing import Any, NamedTuple

import numpy
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lemo.data.conversations import Conversation, Prompted, check_text
from lemo.data.search import AnswerSearch, answer_numbers, not_found, thought_of
from lemo.data.shapes import Shape, Span, StandIn, with_stand_ins
from lemo.models.calls.labels import IGNORE_INDEX

__all__ = ["ChatEncoder", "Encoded"]

_log = logging.getLogger("lemo")

_NO_END = "%s: no label behind answers; the model will not learn where they end"
_NO_THOUGHT = (
    "the chat template leaves out thoughts, which are not trained on then: first that of message "
    "%d of %s"
)

# As Transformers looks for marks.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

# Whatever a row's variables of the template say, which may come from requests for an answer.
_WHOLE = {"add_generation_prompt": False, "continue_final_message": False}

# Texts that are tokenized at a time, and their characters, if one has not more alone. The tokenizer
# shares them out among the cores.
_MOST_TEXTS, _MOST_CHARACTERS = 256, 1 << 22
# Shapes that are remembered: as many as there are ways to take turns, and more where tools differ.
_MOST_SHAPES = 1024

# Templates that ask for today's date get this one: the same data make the same ids on every day.
# It is the one that Llama's write where they cannot ask. In front of a template, because
# Transformers takes no functions as variables.
_DAY = datetime(2024, 7, 26)
_ON_THAT_DAY = (
    "{%- macro strftime_now(format) -%}{{- format"
    + "".join(f"|replace('%{code}', '{_DAY:%{code}}')" for code in "aAbBdHIjmMpSyY")
    + " -}}{%- endmacro -%}"
)


@dataclass(frozen=True, slots=True)
class Encoded:
    """An example as the model reads it.

    Attributes:
        ids: token ids; an array takes a sixth of the memory of a list.
        labels: the ids that are to be predicted, IGNORE_INDEX elsewhere; not shifted.
        name: a short name of the example.
    """

    ids: Sequence[int]
    labels: Sequence[int]
    name: str

    @classmethod
    def of(cls, ids: Any, labels: Any, name: str) -> Encoded:
        """With arrays of numbers that numpy takes."""
        made = [array("i", numpy.asarray(part, numpy.intc).tobytes()) for part in (ids, labels)]
        return cls(made[0], made[1], name)

    @property
    def num_labels(self) -> int:
        """Tokens with a label that some token comes before."""
        return int(numpy.count_nonzero(numpy.asarray(self.labels)[1:] != IGNORE_INDEX))


class _Text(NamedTuple):
    """What is tokenized, and where the answers are in it.

    Attributes:
        special: whether the tokenizer adds its special tokens.
        name: of the example.
    """

    text: str
    spans: list[Span]
    special: bool
    name: str


class ChatEncoder:
    """Applies a chat template and finds the tokens of the answers.

    They are those that the template marks as generated, where it marks any; otherwise they are
    searched for (:class:`AnswerSearch`).

    Conversations that differ in contents alone are of one `Shape`. What a shape needs is looked for
    once; a conversation whose text is of it needs that text only.

    Args:
        tokenizer: a fast tokenizer.
        everything: whether every token gets a label, prompts too.

    Raises:
        ValueError: a tokenizer that does not say where its tokens are in a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, everything: bool = False) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                "tokenizer: expected a fast one, which tells where its tokens are in a text, got "
                f"{type(tokenizer).__name__}"
            )
        self._tokenizer = tokenizer
        self._everything = everything
        self._said: set[str] = set()
        self._shapes: dict[str, Shape] = {}
        added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
        # Some tokenizers have line breaks among the added ones.
        self._special = {
            token for token in (*tokenizer.all_special_tokens, *added) if token.strip()
        }
        # Those that take the white space beside them, which is not of their text.
        self._greedy = {
            number: str(token)
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.lstrip or token.rstrip
        }
        template = tokenizer.chat_template
        self._marks = isinstance(template, str) and bool(_GENERATION.search(template))

    def encode(self, example: Conversation | Prompted) -> Encoded:
        """Ids and labels of one example; see `encode_all`."""
        [encoded] = self.encode_all([example])
        return encoded

    def encode_all(self, examples: Iterable[Conversation | Prompted]) -> Iterator[Encoded]:
        """Ids and labels of examples, in their order; some hundred are read ahead.

        Raises:
            ValueError: the tokenizer has no chat template, the template refuses the messages, or an
                answer is not found in what it makes of them. The message names file and line.
        """
        waiting: list[_Text] = []
        characters = 0
        for text in map(self._text, examples):
            characters += len(text.text)
            if waiting and (len(waiting) == _MOST_TEXTS or characters > _MOST_CHARACTERS):
                yield from self._tokenized(waiting)
                waiting, characters = [], len(text.text)
            waiting.append(text)
        yield from self._tokenized(waiting)

    def _text(self, example: Conversation | Prompted) -> _Text:
        if isinstance(example, Prompted):
            end = self._tokenizer.eos_token or ""
            if not end:
                self._warn(_NO_END, "the tokenizer has no end token")
            elif example.completion.rstrip().endswith(end):
                end = ""
            text = example.prompt + example.completion + end
            # A prompt that a template has made begins with the token that the tokenizer would add.
            begin = self._tokenizer.bos_token
            special = not (begin and text.startswith(begin))
            return _Text(text, [(len(example.prompt), len(text))], special, example.name)
        if self._tokenizer.chat_template is None:
            raise ValueError(
                f"{example.place}: expected a tokenizer with a chat template for messages, got one "
                "without; give 'prompt' and 'completion' as texts, or a tokenizer with a template"
            )
        example, text = self._rendered(example)
        check_text(example.place, "what the chat template makes of the row", text)
        self._check_thoughts(example, text)
        spans = self._spans_of_shape(example, text)
        if spans is None:
            spans = list(self._search(example, text))
        if self._is_marked(example):
            start, end = spans[-1]
            self._check_end(example, text[start:end], "the chat template's generation marks")
        elif not self._everything:
            spans = list(self._answers(example, text, spans))
        return _Text(text, spans, False, example.name)

    def _spans_of_shape(self, example: Conversation, text: str) -> list[Span] | None:
        """What `_search` finds, by the example's shape; None: the text is not of this shape.

        Raises:
            ValueError: the template leaves out tools, documents, a message or part of one.
        """
        messages, stand_ins = with_stand_ins(example.messages)
        key = repr((messages, example.extra, bool(example.context)))
        made = replace(example, messages=tuple(messages))
        shape = self._shapes.get(key)
        if shape is None:
            shape = self._shape(made, stand_ins)
            if len(self._shapes) == _MOST_SHAPES:
                self._shapes.clear()
            self._shapes[key] = shape
        places = shape.places(text, stand_ins) if shape.usable else None
        if places is None:
            return None
        if not shape.learned:
            try:
                shape.learn(self._search(made, shape.text))
            except ValueError:
                shape.usable = False
                return None
        return shape.spans(text, places)

    def _shape(self, example: Conversation, stand_ins: Sequence[StandIn]) -> Shape:
        """Of messages with stand-ins; ValueError where one of these, or tools, are not shown."""
        text = self._render(example, example.messages)
        self._check_added(example, text)
        # Contents may be shown otherwise, and names elsewhere: what counts is whether others are.
        for stand_in in stand_ins:
            if stand_in.text not in text:
                raise self._not_shown(example, stand_in.what)
        return Shape(text, stand_ins)

    def _is_marked(self, example: Conversation) -> bool:
        return self._marks and not self._everything and not example.context

    def _rendered(self, example: Conversation) -> tuple[Conversation, str]:
        """The example as the template reads it, and the text that it makes of it."""
        try:
            return example, self._render(example, example.messages)
        except ValueError:
            # Most templates expect the arguments of calls as objects, some as JSON texts.
            if not any("tool_calls" in message for message in example.messages):
                raise
            texts = tuple(_with_texts_of_arguments(message) for message in example.messages)
            example = replace(example, messages=texts)
            return example, self._render(example, example.messages)

    def _render(
        self, example: Conversation, messages: Sequence[dict[str, Any]], header: bool = False
    ) -> str:
        """The text that the template makes of messages; with the header of an answer to come."""
        settings = {"tokenize": False, "add_generation_prompt": header}
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages),
                **example.extra | _WHOLE | settings,
                chat_template=self._template(example),
            )
        except Exception as error:
            # Templates are programs of others and raise whatever they like.
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{example.place}: the chat template refuses the messages: {reason}"
            ) from error
        return text

    def _template(self, example: Conversation) -> str:
        template: str = self._tokenizer.get_chat_template(None, example.extra.get("tools"))
        return _ON_THAT_DAY + template if "strftime_now" in template else template

    def _check_added(self, example: Conversation, text: str) -> None:
        """ValueError where the template leaves out tools or documents."""
        for name in ("tools", "documents"):
            if not example.extra.get(name):
                continue
            rest = {key: value for key, value in example.extra.items() if key != name}
            if self._render(replace(example, extra=rest), example.messages) == text:
                raise self._not_shown(example, f"'{name}'")

    def _check_thoughts(self, example: Conversation, text: str) -> None:
        """A warning where the template leaves out a thought."""
        for number, message in enumerate(example.messages):
            thought = thought_of(message)
            if thought and thought not in text:
                self._warn(_NO_THOUGHT, number, example.place)

    @staticmethod
    def _not_shown(example: Conversation, what: str) -> ValueError:
        return ValueError(
            f"{example.place}: the chat template does not show {what}; use a template that does, "
            "or leave them out of the data"
        )

    def _search(self, example: Conversation, text: str) -> Iterator[Span]:
        """Where the answers are in the whole text, or what is marked in it.

        Each that is not marked is with the token that ends it, and perhaps white space behind.
        """
        if self._everything:
            return
        if self._is_marked(example):
            yield from self._marked(example)
            return
        render = partial(self._render, example)
        yield from AnswerSearch(example, text, render, self._special).spans()

    def _answers(self, example: Conversation, text: str, spans: Sequence[Span]) -> Iterator[Span]:
        """The answers that are trained on, without what is behind the token that ends them."""
        numbers = answer_numbers(example)
        start = end = 0
        for number, (start, end) in zip(numbers, spans, strict=True):
            end = start + self._trimmed(text[start:end])
            if number not in example.context:
                self._check_answer(example, number, text[start:end])
                yield start, end
        self._check_end(example, text[start:end], "the chat template")

    def _warn(self, message: str, *arguments: object) -> None:
        """A warning, once for each of its kind."""
        if message not in self._said:
            _log.warning(message, *arguments)
        self._said.add(message)

    def _check_answer(self, example: Conversation, number: int, answer: str) -> None:
        for call in example.messages[number].get("tool_calls", ()):
            if call["function"]["name"] not in answer:
                raise not_found(example, number)
        for token in (*self._special, "<think>", "</think>"):
            answer = answer.replace(token, "")
        if not answer.strip():
            raise ValueError(
                f"{example.place}: the chat template shows nothing of the answer of message "
                f"{number}"
            )

    def _trimmed(self, answer: str) -> int:
        """Length of an answer without what follows the token that ends it."""
        last = max(
            (answer.rfind(token) + len(token) for token in self._special if token in answer),
            default=len(answer),
        )
        return last if not answer[last:].strip() else len(answer)

    def _marked(self, example: Conversation) -> list[Span]:
        """What the template marks as generated."""
        _, spans = self._with_marks(example, example.messages)
        if not spans:
            raise ValueError(f"{example.place}: the chat template marks no token as generated")
        messages, stand_ins = with_stand_ins(example.messages, answers_only=True)
        other, marked = self._with_marks(example, messages)
        for stand_in in stand_ins:
            place = other.index(stand_in.text)
            if not any(start <= place < end for start, end in marked):
                raise ValueError(
                    f"{example.place}: the chat template does not mark {stand_in.what}"
                )
        return spans

    def _check_end(self, example: Conversation, answer: str, what: str) -> None:
        """A warning where nothing follows the content of the last answer."""
        last = example.messages[answer_numbers(example)[-1]]["content"]
        if last.strip() and answer.endswith((last, last.rstrip())):
            self._warn(_NO_END, what)

    def _with_marks(
        self, example: Conversation, messages: Sequence[dict[str, Any]]
    ) -> tuple[str, list[Span]]:
        """The text that the template makes of messages, and what it marks in it.

        Transformers' own mask of tokens is not used: some versions lose marks that begin or end
        with white space which the tokenizer's offsets leave out.
        """
        texts, places = render_jinja_template(
            [list(messages)],
            chat_template=self._template(example),
            return_assistant_tokens_mask=True,
            **{**self._tokenizer.special_tokens_map, **example.extra, **_WHOLE},
        )
        return texts[0], [(start, end) for start, end in places[0]]

    def _tokenized(self, texts: Sequence[_Text]) -> Iterator[Encoded]:
        for special, group in groupby(texts, key=lambda text: text.special):
            together = list(group)
            made = self._tokenizer(
                [text.text for text in together],
                add_special_tokens=special,
                return_offsets_mapping=True,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
            for text, *tokens in zip(together, made["input_ids"], made["offset_mapping"]):
                yield self._labelled(text, *tokens)

    def _labelled(self, text: _Text, ids: list[int], offsets: list[tuple[int, int]]) -> Encoded:
        # The end is in the text: one that the tokenizer adds would be a second one.
        while len(ids) > 1 and offsets[-1] == (0, 0):
            ids, offsets = ids[:-1], offsets[:-1]
        made = numpy.array(ids)
        if self._everything:
            return Encoded.of(made, made, text.name)
        count = 2 * len(offsets)
        flat = numpy.fromiter(chain.from_iterable(offsets), dtype=numpy.int64, count=count)
        firsts, lasts = flat[::2], flat[1::2]
        # Some tokenizers leave white space out of the offsets: a token begins where the one before
        # it ends, also behind one that has no place. Tokens of parts of a character all have the
        # character's.
        reached = numpy.maximum.accumulate(numpy.concatenate(([0], lasts[:-1])))
        begins = numpy.minimum(firsts, reached)
        for place in numpy.flatnonzero(numpy.isin(made, list(self._greedy))).tolist():
            word = self._greedy[ids[place]]
            at = text.text.find(word, firsts[place], lasts[place])
            if at >= 0:
                begins[place], lasts[place] = at, at + len(word)
        answer = numpy.zeros(len(ids), dtype=bool)
        for start, end in text.spans:
            # A token across the border of prompt and answer is the answer's to predict.
            answer |= (lasts > start) & (begins < end)
        labels = numpy.where(answer, made, IGNORE_INDEX)
        return Encoded.of(made, labels, text.name)


def _with_texts_of_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose calls have their arguments as JSON texts."""
    calls = []
    for call in message.get("tool_calls", ()):
        arguments = call["function"]["arguments"]
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        calls.append(call | {"function": call["function"] | {"arguments": arguments}})
    return message | {"tool_calls": calls} if calls else message
