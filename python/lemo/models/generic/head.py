"""The loss of hidden states by a model's own head, a chunk of rows at a time."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lemo.models.calls.eval_mode import evaluating
from lemo.models.layers.loss import head_loss, loss_chunk_rows, sum_over_chunks

__all__ = ["Head"]

# By how much losses may differ that the same sums make in another order.
_TOLERANCES = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 2e-2}
# Logits so large that soft-capping and scaling, where a model has them, show.
_LARGE = 64.0


class Head:
    """What a causal LM makes of hidden states, found out by asking it.

    Where its loss is the cross entropy of a linear layer's logits, lemo computes it without them.
    Elsewhere (soft-capped or scaled logits, losses of other libraries) the model's own code does,
    for some rows at a time.

    Args:
        model: the type of the model, for errors.
        head: gives the module of the head, hidden states [N, H] -> [N, V].
        own_sum: (hidden [N, H], labels [N], divisor) -> the model's own loss.
        rules: gives what the answer depends on besides weights; the model is asked again when it
            has changed.
        is_alone: whether the model's loss depends on no weights but those of the head. Others may
            be where they change nothing when the model is asked.
    """

    def __init__(
        self,
        model: str,
        head: Callable[[], nn.Module],
        own_sum: Callable[[Tensor, Tensor, int], Tensor],
        rules: Callable[[], Sequence[object]],
        is_alone: Callable[[], bool],
    ) -> None:
        self._model, self._head, self._own_sum, self._rules = model, head, own_sum, rules
        self._is_alone = is_alone
        self._asked: Sequence[object] | None = None
        self._is_plain = False

    def loss(
        self,
        hidden: Tensor,
        targets: Tensor,
        vocabulary: int,
        chunk_rows: int | None,
        divisor: Tensor | int | None,
        ignore_index: int,
    ) -> Tensor:
        """See `lemo.models.layers.loss.head_loss`.

        Raises:
            ValueError: the model's loss is not a sum over the labels.
        """
        rules = self._rules()
        if rules != self._asked:
            self._is_plain, self._asked = self._look(hidden), rules
        if self._is_plain and self._is_alone():
            return head_loss(
                self._head(), hidden, targets, vocabulary, chunk_rows, divisor, ignore_index
            )

        def chunk_loss(rows: Tensor, labels: Tensor) -> Tensor:
            if labels.numel():
                return self._own_sum(rows, labels, 1)
            # Other processes have some: the head takes part in this one's backward pass, too.
            row, label = rows.new_zeros(1, rows.shape[1]), labels.new_zeros(1)
            return rows.sum() + 0.0 * self._own_sum(row, label, 1)

        rows = loss_chunk_rows(vocabulary) if chunk_rows is None else chunk_rows
        total = sum_over_chunks(chunk_loss, self._head(), hidden, targets, rows)
        return total / (targets.numel() if divisor is None else divisor)

    @torch.no_grad()
    def _look(self, like: Tensor) -> bool:
        """Whether the loss is the cross entropy of the head's logits, on two made-up rows."""
        head = self._head()
        # Dropout would make other logits at each call, and use up random numbers of the training.
        with evaluating(head):
            return self._is_cross_entropy(head, like)

    def _is_cross_entropy(self, head: nn.Module, like: Tensor) -> bool:
        generator = torch.Generator("cpu").manual_seed(0)
        rows = torch.randn(2, like.shape[1], generator=generator, device="cpu").to(like)
        logits = head(rows)
        rows = rows * (_LARGE / logits.abs().amax().float()).to(rows.dtype)
        labels = torch.tensor([0, logits.shape[-1] - 1], device=like.device)
        both = self._own_sum(rows, labels, 1)
        one, other = self._own_sum(rows[:1], labels[:1], 1), self._own_sum(rows[1:], labels[1:], 1)
        halved = self._own_sum(rows, labels, 2)
        plain = cross_entropy(head(rows).float(), labels.to(logits.device), reduction="sum")
        tolerance = _TOLERANCES.get(logits.dtype, 1e-3)
        values = torch.stack([x.float().to(like.device) for x in (both, one, other, halved, plain)])
        total, first, second, half, expected = values.tolist()
        for name, got in (("of two labels", first + second), ("by a divisor", 2 * half)):
            if not abs(got - total) <= tolerance * abs(total):
                raise ValueError(
                    f"model: expected {self._model} to compute its loss as a sum over the labels "
                    f"by num_items_in_batch, got {total:.6g}, but {got:.6g} {name}; train without "
                    "lemo"
                )
        return abs(total - expected) <= tolerance * abs(expected)
