"""The loss of a causal LM in chunks of rows: the logits of a whole sequence never exist."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint

from lemo import ops
from lemo.distributed.context import ContextParallel
from lemo.models.calls.interception import has_own_forward
from lemo.models.calls.labels import IGNORE_INDEX
from lemo.models.layers.architectures import Architecture, active_module
from lemo.models.memory.sharded import check_whole, is_sharded, own_class, run_inside
from lemo.models.projections.as_in_forward import AsInForward
from lemo.models.projections.weights import is_plain
from lemo.ops.linear_cross_entropy import CHUNK_BYTES
from lemo.packing.batch import PackedBatch
from lemo.packing.to_device import to_device

__all__ = [
    "CountedLabels",
    "causal_lm_loss",
    "counted_labels",
    "divisor_of",
    "head_loss",
    "labels_per_counted",
    "loss_chunk_rows",
    "next_labels",
    "rows_among",
    "sum_over_chunks",
]


def next_labels(
    batch: PackedBatch,
    labels: Tensor | None,
    shift_labels: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> tuple[Tensor, Tensor | None]:
    """The label that every row of `batch` predicts, [T], and how many labels padding predicts.

    The number, an int64 scalar on the labels' device, counts first tokens behind padding on the
    left, which only padding would predict; None where nothing is padded.

    Args:
        batch: what the rows are.
        labels: [B, S]; the token at t is predicted from t - 1. None where `shift_labels` are given.
        shift_labels: [B, S], labels that are shifted already; `labels` are not read then.
        ignore_index: the label behind the last one.

    Raises:
        ValueError: not one label for each token of the batch, or padding that has labels.
    """
    name, given = ("labels", labels) if shift_labels is None else ("shift_labels", shift_labels)
    if given.numel() != batch.shape[0] * batch.shape[1]:
        raise ValueError(
            f"{name}: expected [batch, tokens] = {list(batch.shape)}, got {list(given.shape)}"
        )
    given = to_device(given, batch.cu_seqlens.device)
    if shift_labels is None:
        given = pad(given, (0, 1), value=ignore_index)[..., 1:]
    shift_labels = given.reshape(batch.shape)
    padding = batch.padding()
    if padding is None:
        return batch.pack(shift_labels), None
    predicted = padding & (shift_labels != ignore_index)
    wrong, lost = torch.stack(
        ((predicted & pad(padding, (0, 1), value=True)[:, 1:]).sum(), predicted.sum())
    )
    if wrong:
        raise ValueError(
            f"{name}: expected {ignore_index} on padding (attention_mask 0), got {int(wrong)} "
            "labels there, which would count in the model's own loss"
        )
    return batch.pack(shift_labels), lost


def causal_lm_loss(
    architecture: Architecture,
    residual: Tensor,
    targets: Tensor,
    masked: Tensor | None = None,
    chunk_rows: int | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORE_INDEX,
    lost: Tensor | None = None,
    computed: Tensor | None = None,
    context: ContextParallel | None = None,
) -> tuple[Tensor, int]:
    """Next-token cross entropy as Transformers' ForCausalLMLoss defines it, and its labels' number.

    The loss is an fp32 scalar. The final norm and the head see only rows that have a label. Where
    no label is left the loss is 0 (Transformers: nan).

    Args:
        architecture: access to the model.
        residual: [R, H], after the last layer.
        targets: [T], from `next_labels`.
        masked: [T] bool, rows whose own prediction does not count; None: all count.
        chunk_rows: rows whose logits exist at a time; None: as `linear_cross_entropy` has it.
        num_items_in_batch: divisor over several micro-batches; None: the labels used here. Where
            labels are lost or masked, it shrinks by the same share, so that it stays a mean.
        ignore_index: label that does not count.
        lost: scalar, labels of the batch that are not among `targets`.
        computed: [R] int32, ascending, which of the T rows the residual has, among them all that
            count; None: all of them.
        context: processes that share out the rows, of which the residual has this one's; the loss
            is that of all of them. None: the residual has all rows that count.
    """
    counted = counted_labels(targets, masked, num_items_in_batch, ignore_index, lost)
    number = counted.rows.numel()
    if context is not None:
        assert computed is not None
        counted = counted.among(computed, targets.numel())
    rows, targets = counted.rows, counted.targets
    residual, hidden = architecture.final_norm(residual, rows_among(rows, residual, computed))
    if number == 0:
        return hidden.sum(dtype=torch.float32), 0
    vocabulary = architecture.config.vocab_size
    head = architecture.lm_head
    loss = head_loss(head, hidden, targets, vocabulary, chunk_rows, counted.divisor, ignore_index)
    return loss if context is None else context.total(loss), number


class CountedLabels(NamedTuple):
    """The labels of a batch that count in the loss.

    Attributes:
        rows: [N] int64, ascending, the rows that predict them.
        targets: [N] int64.
        divisor: what their losses' sum is divided by; None: N.
    """

    rows: Tensor
    targets: Tensor
    divisor: Tensor | int | None

    def among(self, rows: Tensor, tokens: int) -> "CountedLabels":
        """Those that some rows predict, with the divisor of all.

        Args:
            rows: [R] int32, of the `tokens` rows of the batch.
            tokens: T.
        """
        has = torch.zeros(tokens, dtype=torch.bool, device=rows.device)
        index = has.index_fill_(0, rows.long(), True)[self.rows].nonzero()[:, 0]
        divisor = max(self.rows.numel(), 1) if self.divisor is None else self.divisor
        return CountedLabels(self.rows[index], self.targets[index], divisor)


def counted_labels(
    targets: Tensor,
    masked: Tensor | None,
    num_items_in_batch: Tensor | int | None,
    ignore_index: int,
    lost: Tensor | None,
) -> CountedLabels:
    """Which labels count; the arguments are those of `causal_lm_loss`."""
    labelled = targets != ignore_index
    counted = labelled if masked is None else labelled & ~masked
    divisor = divisor_of(labelled, counted, num_items_in_batch, lost)
    rows = counted.nonzero()[:, 0]
    return CountedLabels(rows, targets[rows], divisor)


def divisor_of(
    labelled: Tensor,
    counted: Tensor,
    num_items_in_batch: Tensor | int | None,
    lost: Tensor | None,
) -> Tensor | int | None:
    """What the sum of the losses is divided by; None: the number of labels that count.

    Args:
        labelled: [T] bool, rows that predict a label.
        counted: [T] bool, those whose prediction counts; `labelled` itself: all.
        num_items_in_batch, lost: as of `causal_lm_loss`.
    """
    divisor = num_items_in_batch
    if divisor is not None and lost is not None:
        count = labelled.sum()
        divisor = divisor * (count / (count + lost).clamp(min=1))
    if divisor is not None and counted is not labelled:
        divisor = divisor * (counted.sum() / labelled.sum().clamp(min=1))
    return to_device(divisor, labelled.device) if torch.is_tensor(divisor) else divisor


def labels_per_counted(labelled: Tensor, lost: Tensor | None, counted: int) -> Tensor:
    """Labels of the batch for each one that counts, fp32 scalar: how much more of them there are.

    Args:
        labelled: [T] bool, rows that predict a label.
        lost: scalar, labels of the batch that none of these rows predicts; None: there are none.
        counted: how many count.
    """
    labels = labelled.sum() if lost is None else labelled.sum() + lost
    return labels.float() / max(counted, 1)


def head_loss(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    vocabulary: int,
    chunk_rows: int | None,
    divisor: Tensor | int | None,
    ignore_index: int,
) -> Tensor:
    """Cross entropy of head(hidden), the sum over the rows by `divisor`; fp32 scalar.

    Args:
        head: [N, H] -> [N, V].
        hidden: [N, H], N > 0.
        targets: [N], every one a label; where the head is a plain linear layer some may be ignored.
        vocabulary: V.
        chunk_rows: rows whose logits exist at a time; None: as `linear_cross_entropy` has it.
        divisor: None: the number of labels.
        ignore_index: which is no label.
    """
    active = active_module(head)
    outer = head if is_sharded(head) else active
    logits: Callable[[Tensor], Tensor] = head
    plain = is_plain(active)
    if is_sharded(outer):
        plain = own_class(active) is nn.Linear and has_own_forward(nn.Linear)
        logits = partial(type(outer).forward, outer)
    if chunk_rows is None and not plain:
        chunk_rows = loss_chunk_rows(vocabulary)

    def loss(rows: Tensor) -> Tensor:
        check_whole(active, "the head")
        if plain:
            return _of_linear(active, rows, targets, chunk_rows, divisor, ignore_index)
        return _of_logits(outer, logits, rows, targets, chunk_rows, divisor)

    return run_inside(outer, loss, hidden)


def _of_linear(
    linear: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    chunk_rows: int | None,
    divisor: Tensor | int | None,
    ignore_index: int,
) -> Tensor:
    hidden, weight, bias = _autocast(hidden, linear.weight, linear.bias)
    return ops.linear_cross_entropy(
        hidden,
        weight,
        targets,
        bias=bias,
        ignore_index=ignore_index,
        chunk_rows=chunk_rows,
        divisor=divisor,
    )


def _of_logits(
    head: nn.Module,
    logits: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    chunk_rows: int,
    divisor: Tensor | int | None,
) -> Tensor:
    def chunk_loss(rows: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits(rows).float(), labels, reduction="sum")

    total = sum_over_chunks(chunk_loss, head, hidden, targets, chunk_rows)
    return total / (targets.numel() if divisor is None else divisor)


def loss_chunk_rows(vocabulary: int) -> int:
    """Rows whose logits exist at a time where a module makes them."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


def sum_over_chunks(
    chunk_loss: Callable[[Tensor, Tensor], Tensor],
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    chunk_rows: int,
) -> Tensor:
    """The sum of chunk_loss(hidden, targets) over chunks of rows; backward computes each again.

    Args:
        chunk_loss: ([n, H], [n]) -> scalar, the sum over n rows.
        head: whose weights it uses.
        hidden: [N, H].
        targets: [N] int64.
        chunk_rows: the most rows of a chunk.
    """
    now = AsInForward(head)

    def checked(rows: Tensor, labels: Tensor) -> Tensor:
        with now.running():
            return chunk_loss(rows, labels)

    losses = [
        checkpoint(checked, rows, labels, use_reentrant=False)
        for rows, labels in zip(hidden.split(chunk_rows), targets.split(chunk_rows))
    ]
    return torch.stack(losses).sum()


def rows_among(rows: Tensor, residual: Tensor, computed: Tensor | None) -> Tensor | None:
    """Where some rows of a batch are in the residual: [N] int32, or None: they are all of it.

    Args:
        rows: [N] int64, ascending.
        residual: [R, H].
        computed: [R] int32, ascending, the rows that the residual has; None: all of the batch.
    """
    if rows.numel() == residual.shape[0]:
        return None
    if computed is not None:
        rows = torch.searchsorted(computed, rows.int())
    return rows.int()


def _autocast(hidden: Tensor, *parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    """What autocast, where it is on, does to the arguments of `linear`."""
    tensors, device = (hidden, *parameters), hidden.device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)
