"""Whether rows meet in attention alone, where a decoder has code that no library wrote.

Leaving rows out is defined where everything but attention treats each row by itself. Code of a
user's, or of a folder that a model was loaded from, may mix rows or count them without a trace in
what `layout` watches: a convolution over tokens, a table of positions that is read by column. So
such a decoder first runs on a few rows of the first batch, on every second of them and on every
third, without gradients. In place of attention stands a function of each row alone. A row must come
out alike, whichever others are there.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lemo.models.calls.eval_mode import evaluating
from lemo.models.calls.interception import is_foreign
from lemo.models.generic.attention import KeptRows, RowsMask, making_masks
from lemo.models.generic.kept import KeptBatch
from lemo.models.generic.layout import LayoutCheck, states_of
from lemo.models.generic.whole import seeing_the_batch
from lemo.models.layers.own_modules import difference_of_rows, may_differ
from lemo.packing.blocks import Selection

__all__ = ["check_row_by_row"]

_ROWS = 32  # of the batch, at most


class _ApartRows(KeptRows):
    """Rows whose attention is a function of each of them alone."""

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
        """The row's value, more or less of it by its rotated query and key; [R, Hq, Dv]."""
        groups = q.shape[1] // k.shape[1]
        direction = torch.arange(q.shape[-1], device=q.device).cos()
        both = q.float() + k.float().repeat_interleave(groups, 1)
        score = both @ direction * (q.shape[-1] ** -0.5 if scale is None else scale)
        share = 1 + 0.5 * score.tanh()
        return (v.float().repeat_interleave(groups, 1) * share[..., None]).to(v.dtype)

    def seen(self, rule: Callable[..., Any], index_by_index: bool) -> Tensor:
        """[1, 1, R, R] bool: each row sees itself."""
        return torch.eye(self.count, dtype=torch.bool, device=self._places.device)[None, None]


def check_row_by_row(
    decoder: PreTrainedModel,
    kept: KeptBatch,
    call: Mapping[str, Any],
    original: Callable[..., Any],
) -> None:
    """Compares a few rows of a batch with some of them alone; see the module.

    Args:
        decoder: it may have code that no library wrote; if not, nothing happens.
        kept: the batch.
        call: the arguments of a call of the decoder for the batch, by name.
        original: the decoder's own forward.

    Raises:
        ValueError: they differ, or as of `LayoutCheck.watching`. The message names the model.
    """
    foreign = [type(module) for module in decoder.modules() if is_foreign(module)]
    if not foreign:
        return
    count = min(kept.batch.layout.num_tokens, _ROWS)
    device = kept.batch.layout.cu_seqlens.device
    few, fewer, some = (
        _states(decoder, _only(kept, torch.arange(0, count, step, device=device)), call, original)
        for step in (2, 3, 1)
    )
    difference = max(difference_of_rows(few, some[::2]), difference_of_rows(fewer, some[::3]))
    if difference <= may_differ(decoder, device):
        return
    names = ", ".join(dict.fromkeys(f"{cls.__module__}.{cls.__name__}" for cls in foreign))
    raise ValueError(
        f"model: expected {kept.model} to treat each token by itself outside of attention, but "
        f"tokens differ by {difference:.2g} of themselves where others are left out: "
        f"something mixes or counts them, perhaps in what is not Transformers' own ({names}); "
        "train without lemo"
    )


def _only(kept: KeptBatch, rows: Tensor) -> KeptBatch:
    """The batch with some of its rows kept."""
    layout = kept.batch.layout
    starts = layout.cu_seqlens
    cu_rows = torch.searchsorted(rows, starts.to(rows.dtype)).int()
    line = torch.searchsorted(starts.to(rows.dtype), rows, right=True) - 1
    positions = (rows - starts[line]).int()
    selection = Selection(layout, rows.int(), positions, cu_rows, None)
    return KeptBatch(kept.batch, selection, kept.model, selection)


def _states(
    decoder: PreTrainedModel,
    kept: KeptBatch,
    call: Mapping[str, Any],
    original: Callable[..., Any],
) -> Tensor:
    """[R, H], what comes of the kept rows with each row's attention apart."""
    selection = kept.selection
    assert selection.rows is not None
    places = selection.rows.expand(2, -1)  # which no rule is asked about
    count, cu_rows, positions = selection.num_rows, selection.cu_rows, selection.positions
    rows = _ApartRows(kept.model, count, cu_rows, positions, places)
    given = kept.arguments(call)
    given["attention_mask"] = _apart(given["attention_mask"], rows)
    if "use_cache" in given:
        given["use_cache"] = False
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(decoder))
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # no graphs for these runs
        stack.enter_context(making_masks(rows))
        # Which says more precisely what is wrong.
        stack.enter_context(LayoutCheck(decoder, rows, given, call).watching())
        stack.enter_context(seeing_the_batch(decoder, kept, call))
        output = original(**given)
    return states_of(output, kept.model)[0]


def _apart(mask: Any, rows: _ApartRows) -> Any:
    """A mask that was made for the kept rows of the pass, for `rows`; others as they are."""
    if isinstance(mask, Mapping):
        return {kind: _apart(one, rows) for kind, one in mask.items()}
    if not isinstance(mask, RowsMask):
        return mask
    seen = None if mask.seen is None else rows.seen(lambda *_: True, False)
    return RowsMask(rows, mask.window, seen)
