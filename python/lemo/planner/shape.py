"""The sizes that memory and time of a training step follow from: the model's, and the step's."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

__all__ = [
    "IN_DTYPE",
    "LINEAR",
    "Adapters",
    "LayerRows",
    "Linear",
    "ModelShape",
    "Step",
    "layer_bytes",
    "shape_of",
    "step_of",
    "united",
    "weight_bytes",
    "window_of",
]

# Classes of Transformers whose layers are modelled: RMSNorm, rotary embedding, gated MLP.
_KNOWN = ("llama", "mistral", "qwen2", "qwen3")
# Bytes of a quantised number, and of the scales beside it where `quantize` stores it: in 4 bits a
# byte for each 64 numbers, and one in fp32 for each 256 of these; else one a row, which is little.
_QUANTISED = {"nf4": 0.5, "int8": 1.0, "float8": 1.0, "torchao_int": 1.0}
_SCALES = {"nf4": (1 + 4 / 256) / 64}
# Linear layers of a decoder layer, in the order in which they run.
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Those whose products are never in 8 bits, in any layer (`lemo.models.layers.products`).
IN_DTYPE = LINEAR[:2]


class Linear(NamedTuple):
    """A linear layer: its name, and the features that it reads and gives."""

    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder of Llama's kind.

    Attributes:
        layers: decoder layers.
        hidden: features of the residual, H.
        width: features of the MLP, F.
        heads, key_heads, head_size: Hq, Hk and D.
        vocabulary: V.
        tied: whether the head's weight is the embedding's.
        head_norms: whether queries and keys are normalised head by head (Qwen3).
        scales: bytes of scales for each number of a quantised weight; None: as the setting
            `quantize` stores it.
        plain: parameters of the linear layers of each decoder layer that stay as they are where the
            others are quantised; empty: none.
    """

    layers: int
    hidden: int
    width: int
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int
    tied: bool = False
    head_norms: bool = False
    scales: float | None = None
    plain: tuple[int, ...] = ()

    @property
    def queries(self) -> int:
        """Features of the queries, Hq D."""
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        """Features of the keys, Hk D."""
        return self.key_heads * self.head_size

    def linears(self) -> tuple[Linear, ...]:
        """The linear layers of a decoder layer, in the order of `LINEAR`."""
        hidden, width = self.hidden, self.width
        inputs = (hidden, hidden, hidden, self.queries, hidden, hidden, width)
        outputs = (self.queries, self.keys, self.keys, hidden, width, width, hidden)
        return tuple(map(Linear, LINEAR, inputs, outputs))

    def layer_parameters(self, names: Collection[str] = LINEAR) -> int:
        """Parameters of the linear layers of a decoder layer that have these names."""
        return sum(each.inputs * each.outputs for each in self.linears() if each.name in names)

    def mlp_parameters(self) -> int:
        """Those of its MLP."""
        return self.layer_parameters(LINEAR[4:])

    def copied_parameters(self) -> int:
        """Those of the whole model that products in 8 bits hold a copy of."""
        copied = [name for name in LINEAR if name not in IN_DTYPE]
        return self.layers * self.layer_parameters(copied) - self.mlp_parameters()  # the last MLP

    def parameters(self) -> tuple[int, int]:
        """(parameters of linear layers, all others) of the whole model, biases apart."""
        linear = self.layers * self.layer_parameters()
        norms = self.layers * 2 * self.hidden + self.hidden
        if self.head_norms:
            norms += self.layers * 2 * self.head_size
        return linear, norms + (1 if self.tied else 2) * self.vocabulary * self.hidden


@dataclass(frozen=True)
class Adapters:
    """LoRA on a model.

    Attributes:
        rank: of every pair that `ranks` does not name.
        targets: adapted linear layers of a decoder layer.
        size: bytes of a number of the adapters, of their gradients and of the optimizer's state.
        apart: whether their products are in their own dtype, because it is another one than the
            model's and autocast is off.
        dropout: whether their inputs are dropped out.
        norms: whether the norms' weights are trained, too, in the adapters' dtype.
        ranks: targets whose pairs have another rank (`rank_pattern`), in the order of `LINEAR`.
    """

    rank: int = 16
    targets: frozenset[str] = frozenset(LINEAR)
    size: int = 4
    apart: bool = False
    dropout: bool = False
    norms: bool = False
    ranks: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of_ranks(cls, ranks: Mapping[str, int], **more: Any) -> Adapters:
        """Pairs of so many ranks on the linear layers of these names.

        Args:
            ranks: by name.
            more: other attributes.
        """
        most = max(ranks.values(), default=0)
        others = tuple((name, ranks[name]) for name in LINEAR if ranks.get(name, most) != most)
        return cls(most, frozenset(ranks), ranks=others, **more)

    def rank_of(self, name: str) -> int:
        """The rank of a linear layer's pair; 0: it has none."""
        return dict(self.ranks).get(name, self.rank) if name in self.targets else 0

    def are_split(self, step: Step) -> bool:
        """Whether pairs multiply as sums of two bf16 numbers
        (`lemo.models.projections.split_low_rank`)."""
        of_eight = all(self.rank_of(name) % 8 == 0 for name in self.targets)
        return self.apart and step.cuda and (step.size, self.size) == (2, 4) and of_eight

    def united(self, other: Adapters) -> Adapters | None:
        """What has all that either has; None: they are of two dtypes."""
        if self == other:
            return self
        trains = [each for each in (self, other) if each.targets or each.norms]
        if len({each.size for each in trains}) > 1:
            return None
        first = trains[0] if trains else self
        targets = self.targets | other.targets
        return Adapters.of_ranks(
            {name: max(self.rank_of(name), other.rank_of(name)) for name in targets},
            size=first.size,
            apart=any(each.apart for each in trains),
            dropout=self.dropout or other.dropout,
            norms=self.norms or other.norms,
        )

    def pair_parameters(self, shape: ModelShape) -> int:
        """Numbers of the pairs of a decoder layer."""
        return sum(
            self.rank_of(each.name) * (each.inputs + each.outputs) for each in shape.linears()
        )

    def parameters(self, shape: ModelShape) -> int:
        """Trainable numbers."""
        count = shape.layers * self.pair_parameters(shape)
        if self.norms:
            count += (2 * shape.layers + 1) * shape.hidden
            count += 2 * shape.layers * shape.head_size * shape.head_norms
        return count


class LayerRows(NamedTuple):
    """Rows that the attention and the MLP of a layer keep."""

    attention: int
    mlp: int


@dataclass(frozen=True)
class Step:
    """A forward and backward pass.

    Attributes:
        lengths: tokens of each sequence.
        rows: kept rows of each layer, of all sequences.
        labels: rows whose loss counts.
        residual_rows: rows of the residual inside of the layers: the kept ones where the others
            are dropped, else all.
        size: bytes of a number of activations.
        autocast: whether autocast is on, under which trainable parameters may be wider.
        cuda: whether it runs on a GPU.
        passes: such passes in an optimizer step.
        loss_chunk: rows of a loss chunk; None: as `lemo.ops.linear_cross_entropy` has it.
        head_groups: of attention's backward where it is recomputed, at most; None: open.
        shifted: whether attention has shifted groups of positions.
        embeds_all: whether all tokens are embedded before rows are dropped.
        processes: that share out the rows (context parallelism); then `rows`, `labels` and
            `residual_rows` are those of one of them, and `lengths` those of the whole batch.
        key_parts: in how many parts keys and values are gathered from the others, at most.
        shards: processes over which weights are cut (FSDP2).
        graphs: whether passes are replayed as CUDA graphs.
        selections: how often a pass selects rows beside the first time.
    """

    lengths: tuple[int, ...]
    rows: tuple[LayerRows, ...]
    labels: int
    residual_rows: int
    size: int = 2
    autocast: bool = False
    cuda: bool = True
    passes: int = 1
    loss_chunk: int | None = None
    head_groups: int | None = 1
    shifted: bool = False
    embeds_all: bool = False
    processes: int = 1
    key_parts: int = 4
    shards: int = 1
    graphs: bool = False
    selections: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of a pass, T."""
        return sum(self.lengths)

    def is_indexed(self, rows: int) -> bool:
        """Whether kept rows are gathered out of the residual by an index."""
        return rows != self.residual_rows

    def shared_out(self, processes: int, key_parts: int = 4) -> Step:
        """The step of one of the processes that share out the rows.

        Args:
            processes: how many there are.
            key_parts: `head_groups` of `lemo.ContextParallel`.
        """

        def share(rows: int) -> int:
            return -(-rows // processes)

        return replace(
            self,
            rows=tuple(LayerRows(*map(share, each)) for each in self.rows),
            labels=share(self.labels),
            residual_rows=share(self.residual_rows),
            # Attention's backward works on all heads of a part at once.
            head_groups=1,
            processes=processes,
            key_parts=key_parts,
        )


def shape_of(config: Any) -> ModelShape:
    """The sizes of a Transformers configuration.

    Raises:
        ValueError: a model whose memory lemo does not model.
    """
    if config.model_type not in _KNOWN:
        raise ValueError(
            f"model: expected one of the types {', '.join(_KNOWN)}, whose memory and time can be "
            f"predicted, got '{config.model_type}'"
        )
    heads = config.num_attention_heads
    return ModelShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        width=config.intermediate_size,
        heads=heads,
        key_heads=config.num_key_value_heads or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocabulary=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
        head_norms=config.model_type == "qwen3",
    )


def united(adapters: Sequence[Adapters]) -> Adapters | None:
    """What has all that any of them has; None: they are of two dtypes."""
    found: Adapters | None = adapters[0]
    for each in adapters[1:]:
        found = None if found is None else found.united(each)
    return found


def window_of(config: Any) -> int:
    """Tokens that attention of every layer sees back, by a Transformers configuration; 0: all, in
    some layer."""
    return (config.sliding_window or 0) if config.model_type == "mistral" else 0


def step_of(
    shape: ModelShape,
    lengths: Sequence[int],
    rows: Sequence[LayerRows],
    labelled: float = 1.0,
    drops: bool = True,
    all_count: bool = False,
    **settings: Any,
) -> Step:
    """The step in which layers keep these rows.

    Args:
        shape: the model.
        lengths: tokens of each sequence.
        rows: of each layer.
        labelled: share of the rows whose loss counts that have a label.
        drops: whether rows that no layer keeps are dropped before the layers (one kept set, and a
            loss of kept rows).
        all_count: whether the loss of all rows may count; else that of as many as a layer keeps.
        settings: further attributes of `Step`.
    """
    kept = max(max(each) for each in rows)
    assert len(rows) == shape.layers
    return Step(
        tuple(lengths),
        tuple(rows),
        labels=max(1, round(labelled * (sum(lengths) if all_count else kept))),
        residual_rows=kept if drops else sum(lengths),
        **settings,
    )


def weight_bytes(shape: ModelShape, size: int, quantize: str | None = None) -> int:
    """Bytes of the frozen weights, linear layers of the decoder quantised or not.

    Args:
        shape: the model.
        size: bytes of a number that is not quantised.
        quantize: as the setting `quantize`, or "torchao_int": integers of torchao, a byte each;
            None: not.
    """
    linear, others = shape.parameters()
    plain = sum(shape.plain)
    quantised = round((linear - plain) * _number_bytes(shape, size, quantize))
    return quantised + (others + plain) * size


def layer_bytes(shape: ModelShape, size: int, quantize: str | None = None) -> int:
    """Those of the linear layers of a decoder layer, the one with the most plain ones."""
    plain = max(shape.plain, default=0)
    quantised = shape.layer_parameters() - plain
    return round(quantised * _number_bytes(shape, size, quantize)) + plain * size


def _number_bytes(shape: ModelShape, size: int, quantize: str | None) -> float:
    """Those of a number of a decoder's linear layer."""
    if quantize not in _QUANTISED:
        return size
    scales = _SCALES.get(quantize, 0.0) if shape.scales is None else shape.scales
    return _QUANTISED[quantize] + scales
