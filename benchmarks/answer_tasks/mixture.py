"""Windows of several tasks in turn, each of which depends on the seed and its number alone."""

from __future__ import annotations

import random
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from answer_tasks.book import book
from answer_tasks.haystacks import Haystacks
from answer_tasks.planted import PLANTED
from answer_tasks.text import text
from answer_tasks.windows import Window, plant

__all__ = ["TASKS", "TRAINED", "Mixture"]

TASKS = (*PLANTED, "book")
# What can be trained on: questions, and text as it is.
TRAINED = (*TASKS, "text")


class Mixture:
    """Window number i is of task i modulo the number of tasks.

    Args:
        tasks: names out of TRAINED.
        haystacks: the texts.
        tokenizer: the model's.
        seed: of everything that is drawn.
        facts: planted in a window, at most.
        asked: questions of a window; of tasks whose questions need several facts, fewer.
        held_out: whether paraphrases are those that training does not see.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        haystacks: Haystacks,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        facts: int = 24,
        asked: int = 6,
        held_out: bool = False,
    ) -> None:
        unknown = [task for task in tasks if task not in TRAINED]
        if unknown or not tasks:
            raise ValueError(f"tasks: expected some of {', '.join(TRAINED)}, got {unknown}")
        if not 1 <= asked <= facts:
            raise ValueError(f"asked: expected 1 to {facts}, the number of facts, got {asked}")
        self.tasks = list(tasks)
        self._haystacks, self._tokenizer = haystacks, tokenizer
        self._seed, self._facts, self._asked = seed, facts, asked
        self._held_out = held_out

    def window(self, index: int, tokens: int) -> Window:
        """Window number `index`, of so many tokens."""
        generator = random.Random(f"{self._seed} {index}")
        task = self.tasks[index % len(self.tasks)]
        if task == "text":
            return text(self._haystacks, tokens, generator)
        if task == "book":
            return book(self._haystacks, self._tokenizer, tokens, self._asked, generator)
        plan = PLANTED[task](self._facts, self._asked, generator, self._held_out)
        return plant(task, plan, self._haystacks, self._tokenizer, tokens, generator)
