"""The two sub-blocks of a layer, attention and MLP, on the rows that they keep.

A sub-block reads rows of the residual, normalizes them, and gives what it adds to the rows that it
keeps (docs/design/models.md). How its activations are treated for backward is another matter: see
`lemo.models.layers.execution`.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from lemo import ops
from lemo.models.layers.architectures import Architecture, GradientTarget
from lemo.models.layers.batch import Batch
from lemo.packing.blocks import Selection

__all__ = ["MLP", "Attention", "Heads"]


class Heads(NamedTuple):
    """What attention multiplies: q [Rq, Hq, D], and k and v [Rk, Hk, D], rotated."""

    q: Tensor
    k: Tensor
    v: Tensor


class Attention:
    """Attention of one layer: project, attend, output.

    Attributes:
        kept: the query rows: the rows that attention adds to.
        keys: the key rows: `kept` itself, or everything.
    """

    def __init__(
        self,
        architecture: Architecture,
        index: int,
        batch: Batch,
        kept: Selection,
        keys: Selection | None = None,
        group_size: int = 0,
    ) -> None:
        """Binds the layer's modules to rows.

        Args:
            architecture: access to the model.
            index: the layer.
            batch: what the rows are.
            kept: the query rows.
            keys: the key rows; None: `kept`.
            group_size: tokens of a shifted attention group; 0: no groups.
        """
        self.kept = kept
        self.keys = kept if keys is None else keys
        self._architecture, self._index, self._batch = architecture, index, batch
        self._group_size = group_size

    def normalize(self, rows: Tensor, target: GradientTarget | None = None) -> Tensor:
        """The norm in front, of gathered key rows [Rk, H]; see `Architecture.normalize`."""
        architecture = self._architecture
        return architecture.normalize(rows, architecture.attention_norm(self._index), target)

    def normalize_residual(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(residual, its normalized key rows [Rk, H])."""
        architecture = self._architecture
        norm = architecture.attention_norm(self._index)
        return architecture.residual_norm(residual, norm, self.keys.rows)

    @property
    def has_shifted_groups(self) -> bool:
        """Whether heads see shifted groups of positions, by the half that they are in."""
        return self._group_size > 0

    def linears(self, x: Tensor, values: bool = True) -> Heads:
        """What `project` rotates; without `values` only gradients of it count."""
        architecture, index = self._architecture, self._index
        if self.keys is self.kept or self.kept.rows is None:
            return Heads(*architecture.queries_keys_values(index, x, values))
        q = architecture.queries(index, x.index_select(0, self.kept.rows), values)
        return Heads(q, *architecture.keys_values(index, x, values))

    def unrotated(self, gradient: Tensor, selection: Selection) -> Tensor:
        """The gradient of heads before they are rotated, from that of rotated ones."""
        return self._batch.rotate(gradient, selection, transposed=True)

    def project(self, x: Tensor) -> Heads:
        """Queries of the kept rows, keys and values of the key rows, from normalized rows."""
        q, k, v = self.linears(x)
        q = self._batch.rotate(q, self.kept)
        k = self._batch.rotate(k, self.keys)
        # Under autocast a norm of the heads (Qwen3) gives its weight's dtype.
        return Heads(q.to(v.dtype), k.to(v.dtype), v)

    def attend(
        self,
        heads: Heads,
        keys: Selection | None = None,
        attention: Callable[..., Tensor] = ops.segment_attention,
    ) -> Tensor:
        """The heads' results [Rq, Hq, D].

        Args:
            heads: from `project`.
            keys: the rows of `heads.k` and `heads.v`; None: the key rows.
            attention: takes the place of `ops.segment_attention`.
        """
        keys = self.keys if keys is None else keys
        positions = keys.positions
        if positions is None and self.kept.positions is not None:
            positions = self._batch.positions
        return attention(
            *heads,
            self.kept.cu_rows,
            keys.cu_rows,
            self.kept.positions,
            positions,
            scale=self._architecture.scale(self._index),
            window=self._architecture.window(self._index),
            group_size=self._group_size,
        )

    def output(self, heads: Tensor, values: bool = True) -> Tensor:
        """What attention adds to the kept rows [Rq, H]; see `Architecture.attention_output`."""
        return self._architecture.attention_output(self._index, heads, values)


class MLP:
    """The MLP of one layer. It works row by row.

    Attributes:
        kept: the rows that it reads and adds to.
    """

    def __init__(self, architecture: Architecture, index: int, kept: Selection) -> None:
        self.kept = kept
        self._architecture, self._index = architecture, index

    @property
    def width(self) -> int:
        """Features of its widest activation."""
        return self._architecture.mlp_width

    def normalize(self, rows: Tensor, target: GradientTarget | None = None) -> Tensor:
        """The norm in front, of gathered rows [R, H]; see `Architecture.normalize`."""
        architecture = self._architecture
        return architecture.normalize(rows, architecture.mlp_norm(self._index), target)

    def normalize_residual(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(residual, its normalized kept rows [R, H])."""
        architecture = self._architecture
        norm = architecture.mlp_norm(self._index)
        return architecture.residual_norm(residual, norm, self.kept.rows)

    def output(self, x: Tensor, values: bool = True, activation: Tensor | None = None) -> Tensor:
        """What the MLP adds, from normalized rows [R, H]; see `Architecture.mlp`."""
        return self._architecture.mlp(self._index, x, values, activation)

    def __call__(
        self, rows: Tensor, values: bool = True, target: GradientTarget | None = None
    ) -> Tensor:
        """What the MLP adds to gathered rows of the residual [R, H]."""
        return self.output(self.normalize(rows, target), values)
