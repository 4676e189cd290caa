"""Bytes of a training step: what each layer stores until backward, and what exists for a moment.

The bytes follow from the tensors that the code keeps (lemo.models.layers.execution,
lemo.models.layers.recompute, lemo.models.projections.linear, the operators), not from measurements;
docs/design/planner.md derives them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

from lemo import _C
from lemo.packing.chunks import COPY_ELEMENTS, chunk_rows, split_heads
from lemo.planner.shape import Adapters, LayerRows, ModelShape, Step, layer_bytes, weight_bytes

__all__ = ["HOST_ALIGNMENT", "MODES", "MOST_CAPTURED", "LayerBytes", "StepMemory"]

MODES = ("none", "selective", "layer")
"""What becomes of a layer's activations, from the fastest to the smallest."""

HOST_ALIGNMENT = 4096
"""What bytes of a tensor on the host are rounded up to."""

MOST_CAPTURED = 1 << 38
"""Multiplications of a layer's forward products beyond which its kernels take longer than the host
takes to issue them, some milliseconds."""

# Ways to store weights of which a matrix is made once for each layer and direction.
_MADE_PLAIN = ("nf4", "float8", "torchao_int")
# Tensors that a layer stores, at most.
_TENSORS = 64
_ATTENTION = ("q_proj", "k_proj", "v_proj")
_MLP = ("gate_proj", "up_proj")
# Bytes of an fp32 number of a pair in three blocks of bf16, and of what a product makes of it.
_SPLIT, _SPLIT_PRODUCT = 6, 12
# Workspace of matrix products, which torch's allocator holds, on GPUs.
_WORKSPACE = 32 * 2**20
# Logits of a loss chunk, see `lemo.ops.linear_cross_entropy`.
_LOGITS = {True: 768 * 2**20, False: 256 * 2**20}
# Bytes of a token: its id, label, next label, position, row, and masks.
_TOKEN = 48


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of one layer.

    Attributes:
        kept: from its forward pass to its backward pass.
        forward: for a moment of its forward pass, beyond those kept.
        backward: for a moment of its backward pass, beyond those kept.
        host: on the host, from its forward pass to its backward pass.
        moving: on the way to the host, or back, while the next layer runs.
        parts: tensors, and a part of one, that are copied there.
    """

    kept: int
    forward: int
    backward: int
    host: int = 0
    moving: int = 0
    parts: int = 0


class StepMemory:
    """The bytes of a step.

    Args:
        shape: the model.
        adapters: LoRA on it.
        step: lengths and kept rows.
        quantize: how the weights are stored.
        fp8: whether frozen weights multiply in 8 bits.
        own: LoRA on each layer, of which `adapters` has all; empty: it is on every layer.
        first: the first layer that has a backward pass, because it or its input is trained.
    """

    def __init__(
        self,
        shape: ModelShape,
        adapters: Adapters,
        step: Step,
        quantize: str | None = None,
        fp8: bool = False,
        own: Sequence[Adapters] = (),
        first: int = 0,
    ) -> None:
        self._fp8, self._own, self._first = fp8, tuple(own), first
        # The step of a model whose layers all have the LoRA that one of them has.
        self._alike = {
            each: StepMemory(shape, each, step, quantize, fp8) for each in {*own} - {adapters}
        }
        self._shape, self._adapters, self._step = shape, adapters, step
        self._quantize = quantize
        size = step.size
        # A norm whose weight has another dtype than the residual runs as Transformers' module.
        self._norms_apart = adapters.norms and adapters.size != size
        self._split = adapters.are_split(step)

    @property
    def step(self) -> Step:
        """Lengths and kept rows."""
        return self._step

    @property
    def key_heads(self) -> int:
        """Key heads of a layer."""
        return self._shape.key_heads

    @property
    def has_head_norms(self) -> bool:
        """Whether queries and keys are normalised head by head."""
        return self._shape.head_norms

    def kind_of(self, index: int) -> tuple[object, ...]:
        """Layers of the same kind and rows have the same bytes."""
        return index < self._first, self._own[index] if self._own else None

    def with_head_groups(self, groups: int) -> StepMemory:
        """The same step with groups of heads."""
        return self._with(head_groups=groups)

    def with_graphs(self) -> StepMemory:
        """The same step, replayed as CUDA graphs."""
        return self._with(graphs=True)

    def _with(self, **settings: Any) -> StepMemory:
        step = replace(self._step, **settings)
        if step == self._step:
            return self
        more = self._quantize, self._fp8, self._own, self._first
        return StepMemory(self._shape, self._adapters, step, *more)

    def capturable(self, spares: bool) -> tuple[str, ...]:
        """The modes of layers whose passes can be replayed as CUDA graphs; empty: none.

        Where they can be, all sub-blocks keeping the same rows is left to the caller to know.

        Args:
            spares: whether only passes are captured whose kernels are short.
        """
        step = self._step
        weights = sum(each.inputs * each.outputs for each in self._shape.linears())
        long = spares and weights * max(max(rows) for rows in step.rows) > MOST_CAPTURED
        others = step.processes > 1 or self._norms_apart or self._quantize == "int8"
        if not step.cuda or long or self._fp8 or others:
            return ()
        # Recomputed layers draw the same random numbers twice.
        return MODES[:1] if self._adapters.dropout else MODES

    # The whole step

    @property
    def trainable(self) -> int:
        """Bytes of the adapters, and of norms that are trained."""
        shape, adapters = self._shape, self._adapters
        if not self._own:
            return adapters.parameters(shape) * adapters.size
        one = replace(shape, layers=1)
        return sum(each.parameters(one) * each.size for each in self._own)

    @property
    def weights(self) -> int:
        """Frozen weights, adapters and the optimizer's state."""
        trainable = self.trainable
        copied = self._shape.copied_parameters() if self._fp8 else 0
        if self._quantize == "float8":
            # Weights in float8 are not copied.
            copied = min(copied, sum(self._shape.plain))
        frozen = weight_bytes(self._shape, self._step.size, self._quantize)
        shards = self._step.shards
        if shards > 1:
            # The share of a process, and what is whole: the head, this layer, and the next one,
            # which is copied behind it has come.
            whole = 3 * layer_bytes(self._shape, self._step.size, self._quantize)
            whole += self._shape.vocabulary * self._shape.hidden * self._step.size
            return (frozen + 3 * trainable) // shards + min(whole, frozen)
        return frozen + copied + 3 * trainable

    @property
    def fixed(self) -> int:
        """What exists in the whole of both passes: weights, the residual or its gradient, tables
        of rotations, what is known of each token, and gradients of adapters."""
        step, shape = self._step, self._shape
        residual = step.residual_rows * shape.hidden * step.size
        rows = step.tokens if step.embeds_all else step.residual_rows
        tables = 2 * rows * shape.head_size * step.size
        gradients = self.trainable
        workspace = _WORKSPACE if step.cuda else 0
        tokens = _TOKEN * step.tokens
        total = self.weights + residual + tables + gradients + tokens + workspace
        # Graphs read copies of a pass's inputs, and write gradients of their own.
        copies = 2 * residual + tables + gradients + _TOKEN * step.residual_rows
        return total + (copies if step.graphs else 0)

    @property
    def loss(self) -> int:
        """What the loss takes beside what layers keep and `fixed`, at its highest."""
        step, shape = self._step, self._shape
        size, rows, hidden = step.size, step.labels, shape.hidden
        budget = _LOGITS[step.cuda]
        number = size if step.cuda else 4
        chunk = step.loss_chunk or _C.plan_loss_chunk(rows, shape.vocabulary, budget * 4 // number)
        if step.cuda and chunk < rows and step.loss_chunk is None:
            chunk = 1 << (chunk.bit_length() - 1)
        chunk = min(chunk, rows)
        logits = chunk * shape.vocabulary * number + 4 * rows + (_WORKSPACE if step.cuda else 0)
        # Rows of the norm, its result, and the gradient of that.
        states = self.loss_kept + size * hidden * rows
        return states + logits

    @property
    def loss_kept(self) -> int:
        """What the loss stores until backward: rows of the last norm, the gradient of its result,
        which forward computes."""
        rows, hidden = self._step.labels, self._shape.hidden
        return rows * (self._norm() + (self._step.size * hidden))

    def peak(self, modes: Iterable[str], shares: Iterable[float] = ()) -> int:
        """The highest bytes of a step with a mode for each layer.

        Args:
            modes: of each layer.
            shares: of its bytes, what goes to the host; empty: nothing.
        """
        stored = highest = moving = 0
        for index, (mode, share) in enumerate(zip_longest(modes, shares, fillvalue=0.0)):
            layer = self.layer(index, str(mode), float(share))
            stored += layer.kept
            highest = max(highest, stored + max(layer.forward, layer.backward) + moving)
            moving = layer.moving
        # What the last layer moves is gone before the loss.
        return self.fixed + max(highest, stored + self.loss, self.embedding)

    def held(self, most: int) -> int:
        """Bytes that graphs keep between steps, beyond what torch counts as allocated.

        Args:
            most: the highest bytes of a pass beside `fixed`.
        """
        return most + self._step.residual_rows * self._shape.hidden * self._step.size + _WORKSPACE

    @property
    def embedding(self) -> int:
        """Beside `fixed`, while all tokens are embedded before rows are dropped: they, and a copy
        of theirs in place of the residual."""
        step = self._step
        rows = 2 * step.tokens if step.embeds_all else step.residual_rows
        return (rows - step.residual_rows) * self._shape.hidden * step.size

    # A layer

    def layer(self, index: int, mode: str, share: float = 0.0) -> LayerBytes:
        """What a layer takes.

        Args:
            index: the layer.
            mode: one of `MODES`.
            share: of what it keeps, what goes to the host.
        """
        rows, alike = self._step.rows[index], self
        if self._own:
            alike = self._alike.get(self._own[index], self)
        layer = alike._stored(rows) if mode == "none" else alike._recomputed(rows, mode)
        if index < self._first:
            # What it would store is gone when it has run.
            layer = LayerBytes(0, layer.forward + layer.kept, 0)
        if not share or not layer.kept:
            return layer
        moved = round(share * layer.kept)
        # Of one tensor a part stays, which comes back as a whole.
        width = self._shape.width if mode == "none" else self._shape.hidden
        cut = max(rows) * width * self._step.size if share < 1 else 0
        moving = min(layer.kept, moved + cut)
        return LayerBytes(
            layer.kept - moved,
            layer.forward + moving,
            layer.backward + moving,
            moved + _TENSORS * HOST_ALIGNMENT,
            moving,
            self._parts(rows, layer.kept, moved, mode),
        )

    def _parts(self, rows: LayerRows, kept: int, moved: int, mode: str) -> int:
        """How many tensors move, the largest first, with the one that is cut.

        Nearly all of what a layer keeps are rows of the MLP's width, and of the model's.
        """
        wide = rows.mlp * self._shape.width * self._step.size
        sizes = [wide, wide] if mode == "none" else []
        size = max(rows) * self._shape.hidden * self._step.size
        parts = 0
        for each in (*sizes, *[size] * (-(-max(kept - sum(sizes), 0) // size))):
            if moved <= 0:
                break
            parts += 1
            if each > moved:
                break
            moved -= each
        return parts

    def _gathered(self, rows: int) -> tuple[int, int]:
        """For a moment of attention's two passes: parts of keys and values of all processes."""
        shape, step = self._shape, self._step
        if step.processes == 1:
            return 0, 0
        parts = max(min(step.key_parts, shape.key_heads), 1)
        part = step.processes * rows * 2 * shape.keys * step.size // parts
        mine = part // step.processes
        # As it came, in the order of the rows, and the next one as it comes; backward has their
        # gradients, what it sends of them, and what is on its way of the part before.
        return 3 * part + 2 * mine, 6 * part + 4 * mine

    def _stored(self, rows: LayerRows) -> LayerBytes:
        shape, size = self._shape, self._step.size
        mlp = rows.mlp * (self._norm() + self._mlp())
        attention = rows.attention * (self._norm() + self._attention(True))
        hidden = size * shape.hidden
        down = rows.mlp * (hidden + size * shape.width) + self._copies(("down_proj",), rows.mlp)
        here, back = self._gathered(rows.attention)
        # When attention's backward runs, what the MLP stored is gone.
        attending = rows.attention * hidden + self._attending(rows.attention, True) - mlp + back
        forward = rows.mlp * (size * shape.width + 2 * hidden + self._rounded())
        if not self._adapters.targets:
            forward += rows.mlp * hidden  # the norm's result, which is not kept
        forward += self._copies(("down_proj",), rows.mlp, backward=False)
        forward = max(forward, here - mlp)
        down += rows.mlp * self._rounded()
        matrices = self._matrices(all_of_mlp=False)
        highest = max(down, attending, 0) + matrices
        return LayerBytes(attention + mlp + self._casts(), forward + matrices, highest)

    def _recomputed(self, rows: LayerRows, mode: str) -> LayerBytes:
        shape, step = self._shape, self._step
        size, hidden = step.size, step.size * shape.hidden
        selective = mode == "selective"
        joined = rows.attention == rows.mlp
        saved = (size * shape.queries + 4 * shape.heads) if selective else 0
        kept = rows.attention * (hidden + saved) + (0 if joined else rows.mlp * hidden)

        chunk = min(chunk_rows(rows.mlp, shape.width), rows.mlp)
        gathered = hidden if step.is_indexed(rows.mlp) else 0
        # Rows, their norm, gate, up and their product; in backward its gradient in place of the
        # norm's result, unless adapters hold both.
        forward = chunk * (2 * hidden + 3 * size * shape.width + self._rounded())
        forward += self._copies(("down_proj",), chunk, backward=False)
        graph = chunk * (self._norm() + self._mlp())
        backward = chunk * (gathered + hidden + size * shape.width + self._rounded()) + graph
        backward += self._copies(("down_proj",), chunk)
        mlp = max(forward + chunk * gathered, backward) + self._matrices(all_of_mlp=True)

        if (step.head_groups or 1) > 1:
            held, attending, computed = self._in_groups(rows.attention, selective)
            if joined:
                highest = max(held + rows.attention * hidden + mlp, attending)
            else:
                highest = max(mlp, attending)
            return LayerBytes(kept, max(computed, forward + chunk * 2 * hidden), highest)
        attention = rows.attention * (self._attention(not selective) + self._norm() - hidden)
        copied = hidden if step.is_indexed(rows.attention) else 0
        here, back = self._gathered(rows.attention)
        attending = attention + rows.attention * copied + back
        attending += self._attending(rows.attention, not selective)
        attending += self._matrices(all_of_mlp=False)
        if joined:
            # The graph of attention and what it adds exist while the MLP's backward runs.
            highest = max(attention + rows.attention * hidden + mlp, attending)
        else:
            highest = max(mlp, attending)
        projected = size * (2 * shape.queries + 2 * shape.keys) + 4 * shape.heads
        computed = rows.attention * (2 * hidden + projected - saved) + here
        return LayerBytes(kept, max(computed, forward + chunk * 2 * hidden), highest)

    def _in_groups(self, rows: int, selective: bool) -> tuple[int, int, int]:
        """Of attention whose backward works on groups of heads, beyond what the layer keeps.

        Returns:
            What is held while the MLP's backward runs, the highest bytes of attention's backward,
            and those of its forward.
        """
        shape, step = self._shape, self._step
        size, hidden = step.size, step.size * shape.hidden
        q, k, lse = size * shape.queries, size * shape.keys, 4 * shape.heads
        out = q + lse
        held = (0 if selective else out) + self._linears(("o_proj",), shape.queries, held=True)
        projecting = hidden + 2 * q + 2 * k
        heads = q + 2 * k
        copied = hidden if step.is_indexed(rows) else 0
        # Of a group: copies of queries, keys, values, result and its gradient; what they become.
        of_group = 3 * q + 2 * k + self._attention_backward() - q
        groups = split_heads(shape.key_heads, step.head_groups or 1, step.shifted)
        most = max(sum(b - a for a, b in ranges) for ranges in groups)
        differentiated = heads + q + max(held + copied, held + of_group * most / shape.key_heads)
        # The graph of the projections; gradients are rotated, and then make one of the rows.
        graph = self._norm() + self._linears(_ATTENTION, shape.hidden, normalised=True)
        if shape.head_norms:
            graph += self._of_head_norms()
        # Norms of heads take more here than where they are computed.
        given = q + 2 * k + max(q, hidden, self._head_norms_backward())
        highest = max(held + copied + projecting, differentiated, graph - hidden + given)
        computed = max(projecting, heads + out, out + hidden) - (out if selective else 0)
        more = self._matrices(all_of_mlp=False) + self._copies((*_ATTENTION, "o_proj"), rows)
        return rows * held, round(rows * highest) + more, rows * computed

    # Bytes of a row

    def _norm(self) -> int:
        """Stored by a norm: its rows and their scale; its result belongs to who reads it."""
        size, hidden = self._step.size, self._shape.hidden
        if self._norms_apart:
            # The module widens the rows, and narrows what it scaled.
            return 4 * hidden + size * hidden + 4
        return size * hidden + 4

    def _attention(self, results: bool) -> int:
        """Stored by attention behind its norm, with or without its result and its logarithms."""
        shape, size = self._shape, self._step.size
        total = self._linears(_ATTENTION, shape.hidden, normalised=True)
        total += size * (shape.queries + 2 * shape.keys)
        total += self._linears(("o_proj",), shape.queries, held=True)
        if shape.head_norms:
            total += self._of_head_norms()
        return total + (self._results() if results else 0)

    def _results(self) -> int:
        """Attention's result and its logarithms."""
        return self._step.size * self._shape.queries + 4 * self._shape.heads

    def _of_head_norms(self) -> int:
        """Stored by norms of queries and keys."""
        shape = self._shape
        widths, heads = shape.queries + shape.keys, shape.heads + shape.key_heads
        return 4 * widths + 4 * heads + (self._step.size * widths if self._adapters.norms else 0)

    def _head_norms_backward(self) -> int:
        """For a moment of the backward pass of the queries' norm, beside its result's gradient:
        five tensors in fp32."""
        return 5 * 4 * self._shape.queries if self._shape.head_norms else 0

    def _mlp(self) -> int:
        """Stored by the MLP behind its norm."""
        shape = self._shape
        total = self._linears(_MLP, shape.hidden, normalised=True)
        total += 2 * self._step.size * shape.width
        return total + self._linears(("down_proj",), shape.width)

    def _linears(
        self, names: tuple[str, ...], width: int, normalised: bool = False, held: bool = False
    ) -> int:
        """Stored by linear layers that read one tensor.

        Args:
            names: the layers.
            width: features of what they read.
            normalised: whether that is a norm's result.
            held: whether somebody else stores it anyway.
        """
        adapters, size = self._adapters, self._step.size
        count = sum(name in adapters.targets for name in names)
        low = sum(map(adapters.rank_of, names))
        if self._split:
            low *= _SPLIT
        else:
            low *= adapters.size if adapters.apart else size
        if adapters.dropout:
            low += count * -(-width // 8)  # the mask's bits
        if normalised and self._norms_apart:
            # The norm's result is wide, and is stored so, once.
            return (self._adapters.size * width if count else 0) + low
        return (0 if held or not count else width * size) + low

    def _attention_backward(self) -> int:
        """For a moment: gradients of attention's result, of queries, keys and values, and the
        kernel's sums."""
        shape, size = self._shape, self._step.size
        gradients = size * (2 * shape.queries + 2 * shape.keys)
        sums = 4 * shape.queries + (8 * shape.heads + 8 if self._step.cuda else 4 * shape.heads)
        return gradients + sums

    def _casts(self) -> int:
        """Copies of adapters in the dtype of their products, which are stored for backward."""
        adapters, size = self._adapters, self._step.size
        if self._split:
            size = _SPLIT
        elif not self._step.autocast or adapters.apart or adapters.size == size:
            return 0
        return size * adapters.pair_parameters(self._shape)

    def _attending(self, rows: int, results: bool) -> int:
        """For a moment of attention's backward: its kernel, the products around it, or norms of
        heads; `results` as of `_attention`."""
        shape = self._shape
        around = rows * self._step.size * (shape.queries + 2 * shape.keys)
        around += self._copies((*_ATTENTION, "o_proj"), rows)
        # Gradients are in the place of queries, keys and values, which are freed, as results are.
        norms = self._head_norms_backward() - (self._results() if results else 0)
        return max(rows * self._attention_backward(), around, rows * norms)

    def _copies(self, names: tuple[str, ...], rows: int, backward: bool = True) -> int:
        """For a moment of one of these layers, where an adapter has dropout or another dtype than
        the model: copies of some rows, which its products read
        (lemo.models.projections.low_rank)."""
        adapters, size = self._adapters, self._step.size
        if not (adapters.apart or adapters.dropout):
            return 0
        wide = adapters.size if adapters.apart and not self._split else 0
        number = wide or size
        if self._split:
            # A mask; the input; in backward its gradient, as a product and masked.
            of_input = 1 + size + (2 * adapters.size if backward else 0) if adapters.dropout else 0
        elif backward:
            # The input and its gradient; a mask, in a byte and as it is multiplied; the product.
            of_input = 2 * number + (1 + 2 * number if adapters.dropout else 0)
        else:
            of_input = 1 + size + number if adapters.dropout else wide
        of_output = wide if backward else 0
        most = ranks = 0
        for name, inputs, outputs in self._shape.linears():
            if name in names and name in adapters.targets:
                part = min(rows, max(1, COPY_ELEMENTS // max(inputs, outputs)))
                most = max(most, part * (inputs * of_input + outputs * of_output))
                ranks += adapters.rank_of(name)
        # What products with the weights of a stack give, and its parts.
        return most + (rows * ranks * (_SPLIT + _SPLIT_PRODUCT) if self._split else 0)

    def _rounded(self) -> int:
        """The widest rows in 8 bits, and their scales."""
        return self._shape.width + 4 if self._fp8 else 0

    def _matrices(self, all_of_mlp: bool) -> int:
        """Matrices that are made of quantised weights: one, or those of an MLP together."""
        if self._quantize not in _MADE_PLAIN and not self._fp8:
            return 0
        numbers = self._shape.hidden * self._shape.width
        one = numbers * (1 if self._fp8 else self._step.size)
        made = 3 * one if all_of_mlp else one
        # torchao makes float8 plain by way of fp32.
        return made + (4 * numbers if self._quantize == "float8" and not self._fp8 else 0)
