"""lemo's attention as a module, and as an attention implementation of Transformers.

Importing this module registers "lemo" with Transformers, so that

    import lemo.attention
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="lemo")

runs dense causal attention, with padding, packed sequences, caches that grow, sliding windows,
soft-capped scores (Gemma 2) and sinks (gpt-oss), through lemo's kernel.
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from lemo import ops
from lemo.packing.batch import PackedBatch

__all__ = ["SegmentAttention", "register_attention", "rotary_tables"]


def rotary_tables(
    positions: Tensor, head_dim: int, theta: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """(cos, sin), [T, head_dim] fp32 each, of rotary embedding (RoFormer, arXiv 2104.09864).

    Args:
        positions: [T], position of each token in its own sequence.
        head_dim: size of a head, even.
        theta: base of the frequencies.

    Raises:
        ValueError: an odd size.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim: expected an even size, got {head_dim}")
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions[:, None].float() * theta ** (-exponents / head_dim)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


class SegmentAttention(nn.Module):
    """Causal self-attention of packed sequences, whole or with tokens eliminated.

    Takes the place of an attention module in a model that works on packed tokens: projections with
    the usual names, grouped heads, optional rotation, window and shifted groups. Give it all
    rows of the sequences, or the kept rows with their original positions.

        attention = SegmentAttention(hidden_size=512, num_heads=8, num_kv_heads=2)
        layout = BlockLayout.from_seqlens([1000, 24], block_size=64)
        y = attention(x, layout.cu_seqlens)                                     # everything
        kept = ops.token_select(scores, layout, "ratio", 0.5, 0, 1)
        ys = attention(x[kept.rows], kept.cu_rows, kept.positions)              # kept rows

    Args:
        hidden_size: size H of a token.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of `num_heads`; None: as many.
        head_dim: size of a head; None: hidden_size // num_heads.
        bias: whether the projections have biases.
        scale: what q . k is multiplied with; None: head_dim ** -0.5.
        window: tokens a query sees back, itself included; 0: all.
        group_size: tokens of a shifted group (LongLoRA, arXiv 2309.12307); 0: no groups.

    Raises:
        ValueError: the heads do not divide, or a size is too small.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        scale: float | None = None,
        window: int = 0,
        group_size: int = 0,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        sizes = {"hidden_size": hidden_size, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
        for name, size in (sizes | {"head_dim": 1 if head_dim is None else head_dim}).items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        for name, size in (("window", window), ("group_size", group_size)):
            if size < 0:
                raise ValueError(f"{name}: expected at least 0, got {size}")
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_kv_heads: expected a divisor of num_heads = {num_heads}, got {num_kv_heads}"
            )
        if head_dim is None:
            if hidden_size % num_heads:
                raise ValueError(
                    f"num_heads: expected a divisor of hidden_size = {hidden_size}, got {num_heads}"
                )
            head_dim = hidden_size // num_heads
        self.head_dim = head_dim
        self.scale = head_dim**-0.5 if scale is None else scale
        self.window = window
        self.group_size = group_size
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=bias)

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        positions: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attention of every row over the rows before it in its own sequence.

        Args:
            x: [R, H] float, sequence after sequence.
            cu_seqlens: [N+1] int32, first row of every sequence.
            positions: [R] int32, ascending in each sequence; None: the row's index in its sequence.
            rotary: (cos, sin), [R, head_dim] each, for example from `rotary_tables`.

        Returns:
            [R, H], in the dtype of the projections.
        """
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rotary is not None:
            q, k = ops.rope(q, *rotary), ops.rope(k, *rotary)
        heads = ops.segment_attention(
            q,
            k,
            v,
            cu_seqlens,
            q_positions=positions,
            k_positions=positions,
            scale=self.scale,
            window=self.window,
            group_size=self.group_size,
        )
        return self.o_proj(heads.flatten(1))


def register_attention() -> None:
    """Registers "lemo" with Transformers' attention and mask interfaces; again is harmless."""
    AttentionInterface.register("lemo", _attention_forward)
    AttentionMaskInterface.register("lemo", _padding_mask)


def _padding_mask(
    batch_size: int,
    kv_length: int,
    q_length: int | None = None,
    q_offset: Tensor | int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    cache_position: Tensor | None = None,
    **kwargs: object,
) -> Tensor | None:
    """The mask that `_attention_forward` gets: [B, kv_length] of 0/1, or None without padding.

    Older Transformers tell the places of the queries, `cache_position`, not length and offset.
    """
    if cache_position is not None:
        q_length, q_offset = cache_position.shape[0], cache_position[0]
    assert q_length is not None
    if q_offset + q_length != kv_offset + kv_length:
        raise ValueError(
            "past_key_values: attention 'lemo' takes caches that end with the newest token, got "
            f"one of {kv_length} places for tokens up to {int(q_offset) + q_length} (a static one?)"
        )
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask[:, -kv_length:]


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    position_ids: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention as Transformers calls it: query [B, Hq, Sq, D], key and value [B, Hk, Sk, D].

    The sinks, `s_aux`, are [Hq]. Returns [B, Sq, Hq, D]; a padded query gets zeros.
    """
    if dropout:
        raise ValueError(f"attention_dropout: attention 'lemo' has none, expected 0, got {dropout}")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if not is_causal:
        raise ValueError(
            f"is_causal: attention 'lemo' is causal, but {type(module).__name__} attends both ways"
        )
    if position_bias is not None:
        raise ValueError("position_bias: not supported by attention 'lemo', expected None")
    batch, _, q_length, _ = query.shape
    kv_length = key.shape[2]
    if attention_mask is not None and tuple(attention_mask.shape) != (batch, kv_length):
        raise ValueError(
            f"attention_mask: expected [batch, keys] = {[batch, kv_length]}, got "
            f"{list(attention_mask.shape)}; attention 'lemo' takes neither prepared masks nor "
            "static caches"
        )
    # Sequences restart where position_ids do, as in a training batch without mask and cache.
    packed = position_ids if attention_mask is None and q_length == kv_length else None
    keys = PackedBatch((batch, kv_length), attention_mask, packed, key.device)
    queries = keys
    if q_length < kv_length:
        # With a cache the queries are the last columns.
        q_mask = None if attention_mask is None else attention_mask[:, -q_length:]
        queries = PackedBatch((batch, q_length), q_mask, None, key.device)
    q_lengths = queries.cu_seqlens.diff()
    cached = keys.cu_seqlens.diff() - q_lengths
    q_positions = queries.positions + cached.repeat_interleave(q_lengths)
    out = ops.segment_attention(
        queries.pack(query.transpose(1, 2)),
        keys.pack(key.transpose(1, 2)),
        keys.pack(value.transpose(1, 2)),
        queries.cu_seqlens,
        keys.cu_seqlens,
        q_positions,
        keys.positions,
        scale=scaling,
        window=sliding_window or 0,
        softcap=softcap or 0.0,
        sinks=None if s_aux is None else s_aux.float(),
    )
    return queries.unpack(out), None


register_attention()
