"""lemo's attention on kept rows, as an attention implementation of Transformers.

While lemo is enabled, a model's configuration names an implementation of lemo's in place of its
own. Which of the two computes is decided by the mask that a layer gets: masks that are made in a
pass on kept rows are `RowsMask`s, and only they reach lemo's attention. So whatever computes a
layer again in backward (any kind of checkpointing) computes what forward did, and everything else
runs through the implementation that the model had before.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from transformers import AttentionInterface
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lemo import ops
from lemo.distributed.attention import SharedKeys, shared_attention

__all__ = ["KeptRows", "RowsMask", "is_registered", "making_masks", "own_attention", "register"]

_PREFIX = "lemo_rows_"

# Arguments of attention that say nothing that rows and mask do not say.
_NOT_READ = {
    "cache_position",
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "logits_to_keep",
    "max_length_k",
    "max_length_q",
    "num_items_in_batch",
    "position_ids",
    "token_type_ids",
}


class KeptRows:
    """The rows of a pass, for attention.

    Attributes:
        model: the type of the model, for errors.
        count: R, the rows.
        counts: whether calls are counted; no compiler lets that be inside of checkpoints.
        calls: how often attention was called.
        by_rule: whether there is a mask by a rule of the model.
    """

    def __init__(
        self,
        model: str,
        count: int,
        cu_rows: Tensor,
        positions: Tensor | None,
        places: Tensor,
        keys: SharedKeys | None = None,
        group_size: int = 0,
    ) -> None:
        """Takes what `segment_attention` asks for.

        Args:
            model: the type of the model.
            count: R.
            cu_rows: [N+1] int32, first row of every sequence.
            positions: [R] int32, position of each row in its sequence; None: 0, 1, 2, ...
            places: [2, R] int64, line and column of each row in the batch.
            keys: the rows of a group of processes, of which these are one's; None: these alone.
            group_size: tokens of a shifted attention group; 0: no groups.
        """
        self._group_size = group_size
        self._keys = keys
        self.model = model
        self.count = count
        self.counts = True
        self.calls = 0
        self.by_rule = False
        self._cu_rows, self._positions, self._places = cu_rows, positions, places

    def on(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """(cu_rows, positions) where a layer is; layers may be on several devices."""
        positions = self._positions
        return self._cu_rows.to(device), None if positions is None else positions.to(device)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        window: int,
        softcap: float,
        sinks: Tensor | None,
    ) -> Tensor:
        """`segment_attention` from the rows to themselves, or to those of all processes."""
        cu_rows, positions = self.on(q.device)
        if self._keys is None:
            places = cu_rows, None, positions, positions
            return ops.segment_attention(
                *(q, k, v, *places, scale, window, self._group_size), softcap=softcap, sinks=sinks
            )
        assert positions is not None
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return shared_attention(
            q, k, v, self._keys, cu_rows, positions, scale, window, softcap, sinks
        )

    def seen(self, rule: Callable[..., Any], index_by_index: bool) -> Tensor:
        """[1, 1, R, R] bool, which rows a query sees by a rule of the model, for the whole batch.

        Args:
            rule: (line, head, column of the query, column of the key) -> whether it is seen.
            index_by_index: whether it takes single indices, not tensors of them.

        Raises:
            NotImplementedError: groups of attention or of processes are asked for.
        """
        if self._keys is not None or self._group_size:
            what = "layerwise.group_size" if self._keys is None else "context_parallel"
            raise NotImplementedError(
                f"{what}: {self.model} masks attention by a rule of its own, for which there is "
                "PyTorch's attention alone; train without"
            )
        self.by_rule = True
        (lines, columns), device = self._places, self._places.device
        sequences = torch.arange(len(self._cu_rows) - 1, device=self._cu_rows.device)
        lengths = self._cu_rows.diff()
        sequences = sequences.repeat_interleave(lengths, output_size=self.count).to(device)
        seen = torch.empty(self.count, self.count, dtype=torch.bool, device=device)
        step = max(1, _PAIRS // max(self.count, 1))
        for first in range(0, self.count, step):
            own = slice(first, first + step)
            if index_by_index:
                found = _each(rule, lines[own], columns[own], columns)
            else:
                found = rule(lines[own, None], 0, columns[own, None], columns[None])
            seen[own] = found & (sequences[own, None] == sequences)
        return seen[None, None]


# How many pairs of rows a rule is asked for at a time.
_PAIRS = 1 << 24


def _each(rule: Callable[..., Any], lines: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """[Q, K] bool of a rule for single indices."""
    head = torch.zeros((), dtype=torch.long, device=lines.device)

    def pair(line: Tensor, query: Tensor, key: Tensor) -> Any:
        return rule(line, head, query, key)

    with TransformGetItemToIndex():
        of_query = torch.vmap(pair, in_dims=(None, None, 0))
        found: Tensor = torch.vmap(of_query, in_dims=(0, 0, None))(lines, queries, keys)
    return found


@dataclass(frozen=True)
class RowsMask:
    """What a layer gets as its attention mask in a pass on kept rows.

    Attributes:
        rows: the rows of the pass.
        window: positions that a query sees back, itself included; 0: all; None: the model masks by
            a rule of its own.
        seen: [1, 1, R, R] bool, what that rule says; None: lemo cannot tell.
    """

    rows: KeptRows
    window: int | None
    seen: Tensor | None = None

    @property
    def ndim(self) -> int:
        """That of a mask which is finished: models that get one hand it on."""
        return 4

    @property
    def shape(self) -> tuple[int, ...]:
        return 1, 1, self.rows.count, self.rows.count

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in vars(RowsMask)["__dataclass_fields__"]:
            raise AttributeError(name)  # asked before the fields are there, by copies and pickles
        raise _ReadsMaskError(
            f"model: {self.rows.model} reads its attention mask ('{name}'), for which lemo has no "
            "tensor; train without lemo"
        )


class _ReadsMaskError(NotImplementedError, AttributeError):
    """Also an AttributeError: whoever only asks whether there is an attribute gets an answer."""


class _Current(threading.local):
    """The pass that runs in this thread.

    Attributes:
        rows: those of the pass; None: masks are the model's own.
        knows_batch: whether masks are made of the whole batch, not of its kept rows alone.
    """

    rows: KeptRows | None = None
    knows_batch = False


_current = _Current()


@contextmanager
def making_masks(rows: KeptRows | None, knows_batch: bool = False) -> Iterator[None]:
    """Masks that are made inside are those of `rows`; None: the model's own.

    Args:
        rows: the rows of a pass.
        knows_batch: whether what makes them has the whole batch, so that its rules speak of the
            batch's lines and columns.
    """
    before = _current.rows, _current.knows_batch
    _current.rows, _current.knows_batch = rows, knows_batch
    try:
        yield
    finally:
        _current.rows, _current.knows_batch = before


def register(original: str) -> str:
    """Registers lemo's attention in place of another implementation; again is harmless.

    Args:
        original: a name that Transformers knows.

    Returns:
        The name of the implementation that computes what `original` does, and on kept rows what
        lemo's attention does.
    """
    # Transformers takes names with "flash" or "/" in them for implementations of their own.
    name = _PREFIX + original.replace("flash", "fl").replace("/", "_").replace("|", "_")
    AttentionInterface.register(name, partial(_attention, original))
    AttentionMaskInterface.register(name, partial(_mask, original))
    return name


def is_registered(name: str) -> bool:
    """Whether an implementation's name is one that `register` returned."""
    return name.startswith(_PREFIX)


def _mask(
    original: str,
    *args: Any,
    mask_function: Callable[..., Any] = causal_mask_function,
    local_size: int | None = None,
    **kwargs: Any,
) -> Any:
    """The mask of one kind of layers; `mask_function` says what a query may see."""
    rows = _current.rows
    if rows is None:
        make = ALL_MASK_ATTENTION_FUNCTIONS.get(original)
        if make is None:
            return None  # as Transformers has it for implementations without masks
        if local_size is not None:
            kwargs["local_size"] = local_size
        return make(*args, mask_function=mask_function, **kwargs)
    given = kwargs.get("attention_mask")
    if isinstance(given, RowsMask):
        return given  # made before, by what knows the batch
    if _same(mask_function, causal_mask_function):
        return RowsMask(rows, 0)
    if local_size and _same(mask_function, sliding_window_causal_mask_function(local_size)):
        return RowsMask(rows, local_size)
    if _current.knows_batch and not _same(mask_function, bidirectional_mask_function):
        return RowsMask(rows, None, rows.seen(mask_function, bool(kwargs.get("use_vmap"))))
    # Some models make masks that none of their layers uses.
    return RowsMask(rows, None)


def _same(a: Any, b: Any) -> bool:
    """Whether two mask functions are made alike: the same code over the same values."""
    if a is b:
        return True
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    codes = getattr(a, "__code__", None), getattr(b, "__code__", None)
    if None in codes:
        return type(a) is type(b) and type(a) in (int, float, str) and bool(a == b)
    if codes[0] is not codes[1]:
        return False
    cells = a.__closure__ or (), b.__closure__ or ()
    return _same(*(tuple(cell.cell_contents for cell in part) for part in cells))


def _attention(
    original: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as Transformers calls it: query [B, Hq, S, D], key and value [B, Hk, S, D]."""
    if isinstance(attention_mask, RowsMask):
        given = module, query, key, value, attention_mask
        return _attend(original, *given, *args, **kwargs), None
    result: tuple[Tensor, Tensor | None] = own_attention(original, type(module))(
        module, query, key, value, attention_mask, *args, **kwargs
    )
    return result


def own_attention(name: str, cls: type) -> Callable[..., Any]:
    """The function by which an attention class attends under an implementation's name.

    Raises:
        NotImplementedError: "eager", of a class that has none.
    """
    if name != "eager":
        function: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[name]
        return function
    for base in cls.__mro__:
        eager: Callable[..., Any] | None
        eager = getattr(sys.modules.get(base.__module__), "eager_attention_forward", None)
        if eager is not None:
            return eager
    raise NotImplementedError(f"model: {cls.__name__} has no eager attention")


def _attend(
    original: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: RowsMask,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> Tensor:
    """[1, R, Hq, D] of q [1, Hq, R, D], and of k and v [1, Hk, R, D] of the same rows."""
    rows = mask.rows
    if rows.counts:
        rows.calls += 1
    if dropout:
        raise ValueError(
            f"attention_dropout: lemo's attention has none, but {rows.model} has {dropout}; set it "
            "to 0 in the model's configuration (attn_pdrop in those of GPT-2's kind)"
        )
    if mask.window is None and mask.seen is None:
        raise NotImplementedError(
            f"model: {rows.model} masks attention by a rule of its own; lemo knows causal "
            "attention, with a sliding window or without"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal and mask.seen is None:
        raise _unsupported(rows, "attention that sees later tokens")
    if sliding_window and mask.seen is None and sliding_window != mask.window:
        raise _unsupported(rows, f"a window of {sliding_window} with a mask of {mask.window}")
    for name, given in kwargs.items():
        if given is not None and not isinstance(given, bool) and name not in _NOT_READ:
            raise _unsupported(rows, f"'{name}' of its attention")
    if query.shape[0] != 1 or query.shape[2] != rows.count or key.shape[2] != rows.count:
        raise ValueError(
            f"model: expected {rows.model} to attend from and to the {rows.count} kept rows, got "
            f"queries {list(query.shape)} and keys {list(key.shape)}"
        )
    # Under autocast a norm of the heads gives its weight's dtype.
    device, dtype = query.device.type, value.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    query, key, value = (x.to(dtype) for x in (query, key, value))
    if mask.window is None:
        return _attend_by_rule(
            original, module, query, key, value, mask, scaling, softcap=softcap, s_aux=s_aux
        )
    q, k, v = (x.transpose(1, 2)[0] for x in (query, key, value))
    try:
        sinks = None if s_aux is None else s_aux.float()
        out = rows.attend(q, k, v, scaling, mask.window, float(softcap or 0.0), sinks)
    except NotImplementedError as error:
        raise NotImplementedError(f"model: {rows.model} needs more: {error}") from error
    return out[None]


def _attend_by_rule(
    original: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: RowsMask,
    scaling: float | None,
    **more: Any,
) -> Tensor:
    """The same by PyTorch, with a mask of all pairs of rows."""
    assert mask.seen is not None
    seen = mask.seen.to(query.device)
    more = {name: value for name, value in more.items() if value is not None}
    # PyTorch's fused attention has neither soft-capped scores nor sinks.
    if more or original == "eager":
        lowest = torch.finfo(query.dtype).min
        added = torch.zeros((), dtype=query.dtype, device=query.device).where(seen, lowest)
        function, given = own_attention("eager", type(module)), added
    else:
        function, given = own_attention("sdpa", type(module)), seen
    out: Tensor = function(
        module, query, key, value, given, dropout=0.0, scaling=scaling, is_causal=False, **more
    )[0]
    return out


def _unsupported(rows: KeptRows, what: str) -> NotImplementedError:
    return NotImplementedError(f"model: {rows.model} needs {what}, which lemo's attention has not")
