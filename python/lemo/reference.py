"""Eager oracle of every op: plain PyTorch, written from the mathematics, slow and obvious.

Every function takes the arguments of the torch op of the same name (docs/design/operators.md),
computes in the dtype of its inputs (pass fp64 for an exact gradient, fp32 for the oracle of a bf16
kernel) and is differentiable by autograd where the op is. Nothing here calls lemo's kernels, and
lemo never calls anything here outside its tests.
"""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

__all__ = [
    "block_attention",
    "block_scores",
    "fp8_rows",
    "linear_cross_entropy",
    "predictor",
    "residual_scatter",
    "rope",
    "segment_attention",
    "select_norm",
    "swiglu",
    "token_select",
    "word_relevance",
]


def _blocks_of(block_starts: Tensor, cu_blocks: Tensor):
    """Yields, for every sequence, the list of (first row, end row) of its blocks."""
    starts, cuts = block_starts.tolist(), cu_blocks.tolist()
    for first, end in pairwise(cuts):
        yield [(starts[b], starts[b + 1]) for b in range(first, end)]


def block_attention(
    q: Tensor, k: Tensor, rows: Tensor, block_starts: Tensor, cu_blocks: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(maximum, logsumexp) of each query's visible logits in each block, [R, H, B]."""
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = scale * torch.einsum("rhd,thd->rht", q, keys)
    token = torch.arange(k.shape[0], device=q.device)
    sequence = torch.bucketize(token, block_starts[cu_blocks.long()], right=True)
    at = rows.long()[:, None]
    visible = (token <= at) & (sequence == sequence[at])
    logits = logits.masked_fill(~visible[:, None], -math.inf)
    results = q.new_full((2, *q.shape[:2], block_starts.numel() - 1), -math.inf)
    for b, (first, end) in enumerate(pairwise(block_starts.tolist())):
        results[0, ..., b] = logits[..., first:end].amax(-1)
        results[1, ..., b] = logits[..., first:end].logsumexp(-1)
    return results[0], results[1]


def block_scores(
    q: Tensor, k: Tensor, block_starts: Tensor, cu_blocks: Tensor, scale: float
) -> Tensor:
    """Scores of blocks, [B]: mean over query blocks m >= n of the pair's max of S (LeMo, 4.1)."""
    groups = q.shape[1] // k.shape[1]
    keys = k.repeat_interleave(groups, dim=1)
    scores = []
    for blocks in _blocks_of(block_starts, cu_blocks):
        for n, (key_first, key_end) in enumerate(blocks):
            maxima = []
            for query_first, query_end in blocks[n:]:
                products = torch.einsum(
                    "ihd,jhd->hij", q[query_first:query_end], keys[key_first:key_end]
                )
                s = scale * products.clamp(min=0).mean(0)
                i = torch.arange(query_first, query_end, device=q.device)[:, None]
                j = torch.arange(key_first, key_end, device=q.device)[None, :]
                maxima.append(s.masked_fill(j >= i, 0.0).max())
            scores.append(torch.stack(maxima).mean())
    return torch.stack(scores) if scores else q.new_zeros(0)


def predictor(x, k_down, k_mid, k_up, q_down, q_mid, q_up, block_starts, cu_blocks) -> Tensor:
    """Predicted scores of blocks, [B] (LeMo, section 4.2)."""

    def embed(rows, down, mid, up):
        return (torch.relu(torch.relu(rows @ down.T) @ mid.T) @ up.T).mean(0)

    scores = []
    for blocks in _blocks_of(block_starts, cu_blocks):
        keys = [embed(x[first:end], k_down, k_mid, k_up) for first, end in blocks]
        if q_down is None:
            scores += [key[0] for key in keys]
            continue
        queries = [embed(x[first:end], q_down, q_mid, q_up) for first, end in blocks]
        for n, key in enumerate(keys):
            scores.append(torch.stack([query @ key for query in queries[n:]]).mean())
    return torch.stack(scores) if scores else x.new_zeros(0)


def token_select(scores, block_starts, cu_blocks, policy, value, keep_first, keep_last):
    """(rows, positions, cu_rows, kept_blocks) of the blocks that a policy keeps, int32."""
    cuts, starts = cu_blocks.tolist(), block_starts.tolist()
    rows: list[int] = []
    positions: list[int] = []
    kept_blocks: list[int] = []
    cu_rows = [0]
    for first, end in pairwise(cuts):
        count = end - first
        forced = {b for b in range(count) if b < keep_first or b >= count - keep_last}
        values = scores[first:end].tolist()
        if policy == "threshold":
            kept = forced | {b for b in range(count) if values[b] >= value}
        else:
            budget = math.ceil(value * count - 1e-9)
            others = sorted(set(range(count)) - forced, key=lambda b: (-values[b], b))
            kept = forced | set(others[: max(budget - len(forced), 0)])
        for b in sorted(kept):
            kept_blocks.append(first + b)
            rows += range(starts[first + b], starts[first + b + 1])
            positions += [
                r - starts[first] for r in range(starts[first + b], starts[first + b + 1])
            ]
        cu_rows.append(len(rows))
    return tuple(
        torch.tensor(list_, dtype=torch.int32, device=scores.device)
        for list_ in (rows, positions, cu_rows, kept_blocks)
    )


def select_norm(x, rows, weight, bias, eps, kind) -> Tensor:
    """norm(x[rows]) * weight (+ bias), [R, H]; kind "rms" or "layer"."""
    selected = x if rows is None else x[rows.long()]
    if kind == "layer":
        selected = selected - selected.mean(-1, keepdim=True)
    variance = selected.square().mean(-1, keepdim=True)
    y = selected * torch.rsqrt(variance + eps) * weight
    return y if bias is None else y + bias


def segment_attention(
    q,
    k,
    v,
    cu_q,
    cu_k,
    q_positions,
    k_positions,
    scale,
    window,
    group_size,
    softcap=0.0,
    sinks=None,
) -> tuple[Tensor, Tensor]:
    """(out [Rq, Hq, Dv], lse [Hq, Rq]) of causal attention among the rows of each sequence."""
    groups, heads = q.shape[1] // k.shape[1], q.shape[1]
    outs, lses = [], []
    for n in range(cu_q.numel() - 1):
        q_first, q_end = int(cu_q[n]), int(cu_q[n + 1])
        k_first, k_end = int(cu_k[n]), int(cu_k[n + 1])
        if q_positions is None:
            i = torch.arange(q_end - q_first, device=q.device)
            j = torch.arange(k_end - k_first, device=q.device)
        else:
            i, j = q_positions[q_first:q_end].long(), k_positions[k_first:k_end].long()
        distance = i[:, None] - j[None, :]
        visible = distance >= 0
        if window > 0:
            visible = visible & (distance < window)
        visible = visible.expand(heads, -1, -1)
        if group_size > 0:
            shift = torch.where(
                torch.arange(heads, device=q.device) < heads // 2, 0, group_size // 2
            )[:, None]
            same = ((i + shift) // group_size)[:, :, None] == ((j + shift) // group_size)[
                :, None, :
            ]
            visible = visible & same
        keys = k[k_first:k_end].repeat_interleave(groups, 1)
        values = v[k_first:k_end].repeat_interleave(groups, 1)
        s = scale * torch.einsum("ihd,jhd->hij", q[q_first:q_end], keys)
        if softcap > 0:
            s = softcap * torch.tanh(s / softcap)
        s = s.masked_fill(~visible, -math.inf)
        if sinks is not None:  # a column of its own, which the values do not see
            s = torch.cat((s, sinks.to(s.dtype)[:, None, None].expand(-1, len(i), 1)), -1)
        lse = torch.logsumexp(s, -1)
        p = torch.exp(s - lse.masked_fill(lse == -math.inf, 0.0)[..., None])[..., : len(j)]
        outs.append(torch.einsum("hij,jhd->ihd", p, values))
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses, 1)


def residual_scatter(x, y, rows) -> Tensor:
    """x with y added to its rows; a new tensor, x is left alone."""
    if rows is None:
        return x + y
    return x.index_add(0, rows.long(), y.to(x.dtype))


def rope(x, cos, sin, rows, transposed) -> Tensor:
    """x * cos + (-x2, x1) * sin of the halves of every head, [R, heads, D], or its transpose."""
    if rows is not None:
        cos, sin = cos[rows.long()], sin[rows.long()]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    if transposed:
        left, right = (x * sin).chunk(2, -1)
        return x * cos + torch.cat((right, -left), -1)
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


def swiglu(gate, up) -> Tensor:
    """gate * sigmoid(gate) * up."""
    return gate * torch.sigmoid(gate) * up


def fp8_rows(x, columns) -> tuple[Tensor, Tensor]:
    """(values in e4m3 as fp32, scales): the largest magnitude of a row becomes 448."""
    x = x.float() if columns is None else x.float() * columns
    largest = x.abs().amax(1, keepdim=True).clamp(min=2.0**-110)
    # Between tensors: a division by a number may be done as a product with its inverse.
    most = torch.full_like(largest, 448)
    return (x * (most / largest)).to(torch.float8_e4m3fn).float(), largest / most


def bf16_split(x, scale, left) -> Tensor:
    """[R, 3, C] fp32: the nearest bf16 number and that of the rest, twice and once."""
    s = scale * (x[:, 0] + x[:, 1] if x.ndim == 3 else x)
    high = s.bfloat16().float()
    low = torch.where(high.isinf(), 0.0, s - high).bfloat16().float()
    return torch.stack((high, high, low) if left else (high, low, high), 1)


def linear_cross_entropy(hidden, weight, bias, labels, ignore_index) -> tuple[Tensor, Tensor]:
    """(sum of the cross entropies of labels that are not ignored, their number)."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    used = labels != ignore_index
    picked = logits[used].gather(1, labels[used][:, None])[:, 0]
    return (torch.logsumexp(logits[used], -1) - picked).sum(), used.sum()


def word_relevance(
    ids: Tensor, firsts: Sequence[int], ends: Sequence[int], block_size: int
) -> Tensor:
    """See `lemo.ops.word_relevance`; by sets of words, window by window."""
    words, count = ids.tolist(), ids.numel()
    blocks = [range(b, min(b + block_size, count)) for b in range(0, count, block_size)]
    labelled = {row for first, end in zip(firsts, ends) for row in range(first, end)}
    free = [not labelled & set(block) for block in blocks]
    with_word = Counter(word for block in blocks for word in {words[t] for t in block})
    in_blocks = {word: math.log(len(blocks) / n) for word, n in with_word.items()}
    in_tokens = {word: math.log(count / n) for word, n in Counter(words).items()}
    rows = [
        _answer_relevance(words, blocks, free, in_blocks, in_tokens, first, end)
        for first, end in zip(firsts, ends)
    ]
    return torch.stack(rows) if rows else torch.zeros(0, len(blocks))


def _answer_relevance(
    words: list[int],
    blocks: list[range],
    free: list[bool],
    in_blocks: dict[int, float],
    in_tokens: dict[int, float],
    first: int,
    end: int,
) -> Tensor:
    """[B], of the answer of the rows [first, end)."""
    counting = {t for b, block in enumerate(blocks) if free[b] for t in block if t <= first}

    def weight(wanted: set[int], token: int, window: int) -> float:
        """Of the different words among the tokens of the window that ends at `token`."""
        seen = {words[t] for t in range(token + 1 - window, token + 1) if t in counting}
        return sum(in_tokens[word] for word in seen & wanted)

    def places(wanted: set[int]) -> list[int]:
        return [t for t in sorted(counting) if words[t] in wanted and in_tokens[words[t]]]

    own, answer = set(words[max(first - 15, 0) : end + 1]), set(words[first + 1 : end + 1])
    shared, near = torch.zeros(len(blocks)), torch.zeros(len(blocks))
    for b, block in enumerate(blocks):
        shared[b] = sum(in_blocks[w] for w in own & {words[t] for t in block if t in counting})
    found = places(answer)
    if found:
        place = max(found, key=lambda t: (weight(answer, t, 16), -t))
        around = set(words[max(place - 23, 0) : place + 9])
        most = [weight(around, t, 16) ** 2 for t in range(first + 1)]
        for b, block in enumerate(blocks):
            if free[b]:
                near[b] = max(most[block.start : block.stop + 15], default=0.0)
    tiny = torch.finfo(torch.float32).tiny
    return torch.maximum(shared / shared.sum().clamp(min=tiny), near / near.sum().clamp(min=tiny))
