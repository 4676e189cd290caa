"""Which token ids a model can take: those that its embedding has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lemo.data.reading import first_of


class Vocabulary:
    """The ids that a model has an embedding for, beside those that its tokenizer knows.

    Of a vocabulary that is larger than the embedding only added tokens are let through, since many
    models have some that no text contains, such as one for padding; a text that holds one of them
    is refused.

    Args:
        tokenizer: the model's tokenizer.
        prefix: ids that it puts in front of a text.
        size: rows of the model's embedding; None checks nothing.

    Raises:
        ValueError: ordinary tokens, or one of `prefix`, have no embedding.
    """

    def __init__(self, tokenizer: Any, prefix: Sequence[int], size: int | None):
        self.size = size
        self._beyond: dict[str, int] = {}
        # A tokenizer that is no more than a function is taken at its word, text by text.
        if size is None or not hasattr(tokenizer, "get_vocab"):
            return
        self._beyond = {word: i for word, i in tokenizer.get_vocab().items() if i >= size}
        added = set(tokenizer.added_tokens_decoder) - set(prefix)
        wrong = [word for word, i in self._beyond.items() if i not in added]
        if wrong:
            raise ValueError(
                f"tokenizer: expected ids below {size}, the rows of the model's embedding, but "
                f"{len(wrong)} of its tokens are beyond: {first_of(wrong)}; the tokenizer belongs "
                "to another model, or the embedding was not resized"
            )

    def check_text(self, text: str, name: str) -> None:
        """Raises ValueError where the document `name` spells a token without an embedding."""
        for word, number in self._beyond.items():
            if word in text:
                raise ValueError(self._refusal(name, word, number))

    def check_ids(self, ids: Sequence[int], name: str) -> None:
        """Raises ValueError where the document `name` has an id without an embedding."""
        if self.size is None or not len(ids):
            return
        number = max(ids)
        if number >= self.size:
            word = next((word for word, i in self._beyond.items() if i == number), None)
            raise ValueError(self._refusal(name, word, number))

    def _refusal(self, name: str, word: str | None, number: int) -> str:
        token = f"the id {number}" if word is None else f"the token {word!r} with the id {number}"
        return (
            f"documents: '{name}' has {token}, but the model's embedding ends at {self.size}; "
            "take it out of the text, or resize the model's embedding"
        )
