"""Exact answers of a dense model: conversations whose answers it would give token by token."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lemo.data.chat import Encoded
from lemo.data.conversations import parse_example
from lemo.data.examples import of_copies, remarks_of, shorten
from lemo.data.reading import first_of
from lemo.data.rows import read_rows
from lemo.data.training_data import encode_examples
from lemo.models.calls.eval_mode import evaluating
from lemo.models.calls.labels import IGNORE_INDEX
from lemo.training.evaluate import (
    check_context,
    check_sizes,
    load_for_evaluation,
    logits_of_rows,
    vocabulary_of,
)

__all__ = ["Answer", "answers_of", "evaluate_answers", "has_answers"]

_log = logging.getLogger("lemo")


@dataclass(frozen=True)
class Answer:
    """What a model makes of one answer, a run of tokens with labels, when all before it is given.

    Attributes:
        tokens: of the answer.
        right: tokens that the model puts first.
        loss: sum of their cross entropies, in nats.
    """

    tokens: int
    right: int
    loss: float

    @property
    def exact(self) -> bool:
        """Whether the model puts every token of the answer first."""
        return self.right == self.tokens


@torch.no_grad()
def answers_of(model: PreTrainedModel | PeftModel, example: Encoded) -> list[Answer]:
    """The answers of an example, in their order; every token is present, nothing is left out.

    Args:
        model: a causal LM in eval mode.
        example: ids and labels; labels are not shifted.
    """
    ids, labels = torch.tensor(example.ids), torch.tensor(example.labels)
    rows = (labels[1:] != IGNORE_INDEX).nonzero()[:, 0]
    if not len(rows):
        return []
    # Logits of the rows that predict answers only.
    logits = logits_of_rows(model, ids, rows)
    wanted = labels[rows + 1].to(logits.device)
    losses = cross_entropy(logits, wanted, reduction="none").cpu()
    right = (logits.argmax(-1) == wanted).cpu()
    # An answer ends where the next row does not follow the last one.
    lengths = _run_lengths(rows)
    return [
        Answer(len(of_answer), int(of_answer.sum()), loss.double().sum().item())
        for of_answer, loss in zip(right.split(lengths), losses.split(lengths), strict=True)
    ]


def _run_lengths(rows: torch.Tensor) -> list[int]:
    """Lengths of the runs of consecutive numbers in ascending `rows`."""
    ends = [*((rows.diff() != 1).nonzero()[:, 0] + 1).tolist(), len(rows)]
    return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def has_answers(documents: str | Path) -> bool:
    """Whether a file holds examples with answers, by its first row; otherwise it holds texts.

    Raises:
        FileNotFoundError, ValueError: it cannot be read.
    """
    return parse_example(next(read_rows(documents))) is not None


def evaluate_answers(
    model: str | Path | PreTrainedModel | PeftModel,
    documents: str | Path,
    lengths: Sequence[int],
    adapter: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    rope_scaling: str = "none",
    dtype: str = "auto",
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    device: str = "auto",
) -> list[dict[str, Any]]:
    """Exact answers, without elimination, of the examples in a file.

    An answer is exact if each of its tokens is the most likely one behind the right tokens before
    it.

    Args:
        model: folder or hub name, or a model in eval mode; see `lemo.training.evaluate.evaluate`,
            also for `adapter`, `tokenizer`, `rope_scaling`, `dtype` and `device`.
        documents: conversations or prompts with completions; see `lemo.data.open_training_data`.
        lengths: tokens of an example at most; the middle of longer prompts is cut.
        limit: at most so many examples, the first ones.
        progress: called with (examples done, examples in all).

    Returns:
        For every length {"kind": "answers", "length", "documents" (examples), "answers" (their
        number), "exact" (share of them), "right_tokens" (share of their tokens), "perplexity" (of
        their tokens)}.

    Raises:
        ValueError, FileNotFoundError: what was given cannot be read or does not fit together, or
            no example is left; the message names it.
        FloatingPointError: a loss is not a number.
    """
    check_sizes(lengths, limit)
    tokenizer, vocab_size = vocabulary_of(model, tokenizer)
    rows = itertools.islice(read_rows(documents), limit)
    examples = list(encode_examples(rows, tokenizer, vocab_size))
    fitting = {length: _fitting(examples, length) for length in lengths}
    if isinstance(model, str | Path):
        model = load_for_evaluation(
            str(model), max(lengths), adapter, rope_scaling, dtype=dtype, device=device
        )
    windows = itertools.chain.from_iterable(fitting.values())
    check_context(model, max(len(example.ids) for example in windows))
    total, done, results = sum(map(len, fitting.values())), 0, []
    with evaluating(model):
        for length, chosen in fitting.items():
            answers: list[Answer] = []
            for example in chosen:
                answers += answers_of(model, example)
                done += 1
                if progress is not None:
                    progress(done, total)
            results.append(_summary(length, len(chosen), answers))
    return results


def _fitting(examples: Iterable[Encoded], length: int) -> list[Encoded]:
    """The examples, cut to `length` tokens, that have an answer then; what was done is logged.

    Raises:
        ValueError: there is none.
    """
    left_out, fitting, cuts = [], [], []
    for example in examples:
        made = shorten(example, length) if example.num_labels else None
        if made is None:
            left_out.append(example.name)
        else:
            fitting.append(made.example)
            cuts.append(made.cut)
    if not fitting:
        raise ValueError(
            f"documents: expected an example with answers of fewer than {length} tokens, got none "
            f"in {first_of(left_out)}"
        )
    shortened = sum(cut > 0 for cut in cuts)
    copies = of_copies("examples", ((each.ids, each.labels) for each in fitting))
    for line in (*remarks_of(len(fitting), length, shortened, sum(cuts), left_out), *copies):
        _log.info("%s", line)
    return fitting


def _summary(length: int, examples: int, answers: Sequence[Answer]) -> dict[str, Any]:
    """One row of the result."""
    tokens = sum(answer.tokens for answer in answers)
    mean = sum(answer.loss for answer in answers) / tokens
    if math.isnan(mean):
        raise FloatingPointError(
            f"model: the loss of answers in {length} tokens is nan; expected weights and "
            "activations that are finite in the dtype"
        )
    return {
        "kind": "answers",
        "length": length,
        "documents": examples,
        "answers": len(answers),
        "exact": sum(answer.exact for answer in answers) / len(answers),
        "right_tokens": sum(answer.right for answer in answers) / tokens,
        "perplexity": math.exp(mean) if mean < 700 else math.inf,
    }
