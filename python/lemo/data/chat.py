"""From a conversation to ids and labels, by the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lemo.data.conversations import Conversation, Prompted
from lemo.models.labels import IGNORE_INDEX

__all__ = ["ChatEncoder", "Encoded"]

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Encoded:
    """An example as the model reads it.

    Attributes:
        ids: token ids.
        labels: the ids that are to be predicted, IGNORE_INDEX elsewhere; not shifted.
        name: a short name of the example.
    """

    ids: list[int]
    labels: list[int]
    name: str

    @property
    def num_labels(self) -> int:
        """Tokens with a label that some token comes before."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


class ChatEncoder:
    """Applies a chat template and finds the tokens of the answers.

    They are those that the template marks as generated, where it marks any; otherwise each answer
    is found by what comes before it: the text of the messages so far with the header of an answer
    is the beginning of the whole text, and the answer, with the token that ends it, follows there.

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
        self._special = set(tokenizer.all_special_tokens) | {
            str(token) for token in tokenizer.added_tokens_decoder.values()
        }
        template = tokenizer.chat_template
        self._marks = isinstance(template, str) and "{% generation" in template.replace("{%-", "{%")

    def encode(self, example: Conversation | Prompted) -> Encoded:
        """Ids and labels.

        Raises:
            ValueError: the tokenizer has no chat template, the template refuses the messages, or an
                answer is not found in what it makes of them. The message names file and line.
        """
        if isinstance(example, Prompted):
            end = self._tokenizer.eos_token or ""
            text = example.prompt + example.completion + end
            return self._label(text, [(len(example.prompt), len(text))], example, special=True)
        if self._tokenizer.chat_template is None:
            raise ValueError(
                f"{example.place}: expected a tokenizer with a chat template for messages, got one "
                "without; give 'prompt' and 'completion' as texts, or a tokenizer with a template"
            )
        if self._marks and not self._everything:
            return self._marked(example)
        text = self._render(example, example.messages)
        return self._label(text, list(self._answers(example, text)), example, special=False)

    def _render(
        self, example: Conversation, messages: Sequence[dict[str, Any]], header: bool = False
    ) -> str:
        """The text that the template makes of messages; with the header of an answer to come."""
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=header, **example.extra
            )
        except Exception as error:
            # Templates are programs of others and raise whatever they like.
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{example.place}: the chat template refuses the messages: {reason}"
            ) from error

    def _answers(self, example: Conversation, text: str) -> Iterator[Span]:
        """Where the answers are in the whole text, each with the token that ends it."""
        for number, message in enumerate(example.messages):
            if message["role"] != "assistant":
                continue
            before = self._render(example, example.messages[:number], header=True)
            if not text.startswith(before):
                # Where the header of an answer says more than an earlier answer's has.
                before = self._render(example, example.messages[:number])
            if not text.startswith(before):
                raise self._not_found(example, number)
            through = self._render(example, example.messages[: number + 1])
            end = len(through)
            if not text.startswith(through):
                # Templates show earlier answers without their thoughts: look for the content.
                content = message["content"].strip()
                place = text.find(content, len(before))
                if place < 0:
                    raise self._not_found(example, number)
                end = place + len(content)
                end += self._special_length(text[end:])
            yield len(before), len(before) + self._trimmed(text[len(before) : end])

    def _trimmed(self, answer: str) -> int:
        """Length of an answer without what follows the token that ends it."""
        last = max(
            (answer.rfind(token) + len(token) for token in self._special if token in answer),
            default=len(answer),
        )
        return last if not answer[last:].strip() else len(answer)

    def _special_length(self, text: str) -> int:
        """Length of the special token, after white space, that a text begins with; 0: none."""
        skipped = len(text) - len(text.lstrip())
        found = [token for token in self._special if text.startswith(token, skipped)]
        return skipped + max(map(len, found)) if found else 0

    @staticmethod
    def _not_found(example: Conversation, number: int) -> ValueError:
        return ValueError(
            f"{example.place}: the answer of message {number} is not found in what the chat "
            "template makes of the messages; use a template with generation marks"
        )

    def _marked(self, example: Conversation) -> Encoded:
        try:
            made = self._tokenizer.apply_chat_template(
                list(example.messages),
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
                **example.extra,
            )
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{example.place}: the chat template refuses the messages: {reason}"
            ) from error
        ids, mask = made["input_ids"], made["assistant_masks"]
        if not any(mask):
            raise ValueError(f"{example.place}: the chat template marks no token as generated")
        labels = [i if answer else IGNORE_INDEX for i, answer in zip(ids, mask)]
        return Encoded(list(ids), labels, example.name)

    def _label(
        self, text: str, spans: list[Span], example: Conversation | Prompted, special: bool
    ) -> Encoded:
        made = self._tokenizer(
            text, add_special_tokens=special, return_offsets_mapping=True, verbose=False
        )
        ids, offsets = made["input_ids"], made["offset_mapping"]
        if self._everything:
            return Encoded(ids, list(ids), example.name)
        labels = [IGNORE_INDEX] * len(ids)
        remaining = iter([*spans, (len(text) + 1, len(text) + 1)])
        start, end = next(remaining)
        for place, (first, last) in enumerate(offsets):
            while first >= end:
                start, end = next(remaining)
            # A token across the border of prompt and answer is the answer's to predict.
            if last > start and last > first:
                labels[place] = ids[place]
        return Encoded(ids, labels, example.name)
