"""The loss of hidden states by a model's own head, a chunk of rows at a time."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lemo.models.calls.eval_mode import evaluating
from lemo.models.calls.interception import parts_of_loss
from lemo.models.generic.parts import Parts
from lemo.models.layers.loss import head_loss, loss_chunk_rows, sum_over_chunks

__all__ = ["Head", "has_head_alone", "rules_of_loss"]

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
        ignore_index: the label that `own_sum` does not count.
    """

    def __init__(
        self,
        model: str,
        head: Callable[[], nn.Module],
        own_sum: Callable[[Tensor, Tensor, int], Tensor],
        rules: Callable[[], Sequence[object]],
        is_alone: Callable[[], bool],
        ignore_index: int,
    ) -> None:
        self._model, self._head, self._own_sum, self._rules = model, head, own_sum, rules
        self._is_alone, self._ignore_index = is_alone, ignore_index
        self._asked: Sequence[object] | None = None
        self._is_plain, self._added = False, 0.0

    def adds(self, like: Tensor) -> bool:
        """Whether the model's loss has a part that comes neither from labels nor hidden states.

        Such as one of routers that their modules keep until the loss is made.

        Args:
            like: [N, H], of the dtype and on the device of hidden states.

        Raises:
            ValueError: as of `loss`.
        """
        self._ask(like)
        return self._added != 0

    def _ask(self, like: Tensor) -> None:
        rules = self._rules()
        if rules != self._asked:
            self._look(like)
            self._asked = rules

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
            ValueError: the model's loss is not a sum over the labels, or has a part that lemo
                cannot tell from it.
        """
        self._ask(hidden)
        if self._is_plain and self._is_alone():
            return head_loss(
                self._head(), hidden, targets, vocabulary, chunk_rows, divisor, ignore_index
            )
        if self._added:
            raise ValueError(
                f"model: {self._model} adds {self._added:.6g} to a loss that is not the cross "
                "entropy of its head's logits; lemo cannot take the two apart; train without lemo"
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
    def _look(self, like: Tensor) -> None:
        """Looks at the loss of two made-up rows.

        Whether it is the cross entropy of the head's logits, and whether there is more to it.
        """
        head = self._head()
        # Dropout would make other logits at each call, and use up random numbers of the training.
        with evaluating(head):
            self._compare(head, like)

    def _compare(self, head: nn.Module, like: Tensor) -> None:
        generator = torch.Generator("cpu").manual_seed(0)
        rows = torch.randn(2, like.shape[1], generator=generator, device="cpu").to(like)
        logits = head(rows)
        rows = rows * (_LARGE / logits.abs().amax().float()).to(rows.dtype)
        labels = torch.tensor([0, logits.shape[-1] - 1], device=like.device)
        both = self._own_sum(rows, labels, 1)
        one, other = self._own_sum(rows[:1], labels[:1], 1), self._own_sum(rows[1:], labels[1:], 1)
        halved = self._own_sum(rows, labels, 2)
        ignored = torch.full_like(labels, self._ignore_index)
        bare, other_bare = (self._own_sum(x, ignored, 1) for x in (rows, -0.5 * rows))
        plain = cross_entropy(head(rows).float(), labels.to(logits.device), reduction="sum")
        tolerance = _TOLERANCES.get(logits.dtype, 1e-3)
        found = both, one, other, halved, bare, other_bare, plain
        values = torch.stack([x.float().to(like.device) for x in found])
        total, first, second, half, added, *rest = values.tolist()
        other_added, expected = rest
        self._added = added if added == added else 0.0  # nan: a mean over no label, found below
        if self._added:
            if not abs(other_added - added) <= 1e-5 * abs(added):
                raise ValueError(
                    f"model: {self._model} adds to its loss what it makes of hidden states without "
                    f"labels ({added:.6g} of two rows), of which lemo has no definition; train "
                    "without lemo"
                )
            total, first, second, half = (x - added for x in (total, first, second, half))
        for name, got in (("of two labels", first + second), ("by a divisor", 2 * half)):
            if not abs(got - total) <= tolerance * abs(total):
                raise ValueError(
                    f"model: expected {self._model} to compute its loss as a sum over the labels "
                    f"by num_items_in_batch, got {total:.6g}, but {got:.6g} {name}; train without "
                    "lemo"
                )
        self._is_plain = abs(total - expected) <= tolerance * abs(expected)


def rules_of_loss(parts: Parts) -> list[object]:
    """What a causal LM's own loss depends on besides weights: code, and numbers such as a cap."""
    causal_lm = parts.causal_lm
    owners = (causal_lm, causal_lm.config, parts.decoder.config)
    numbers = (value for owner in owners for value in vars(owner).values() if _is_number(value))
    return [type(causal_lm).forward, causal_lm.loss_function, *parts_of_loss(), *numbers]


def has_head_alone(parts: Parts) -> bool:
    """Whether a causal LM has no weights but its base's and its head's, such as a scale of logits
    that is trained."""
    apart = parts.base, parts.causal_lm.get_output_embeddings()
    modules: list[nn.Module] = [parts.causal_lm]
    for module in modules:
        if module._parameters or module._buffers:
            return False
        modules += (child for child in module.children() if child not in apart)
    return True


def _is_number(value: object) -> bool:
    return value is None or isinstance(value, int | float)
