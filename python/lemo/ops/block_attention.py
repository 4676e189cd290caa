import torch


def block_attention(q, k, rows, layout, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    R, H, D = q.shape
    g = H // k.shape[1]
    mx = q.new_full((R, H, layout.num_blocks), -torch.inf, dtype=torch.float32)
    lse = mx.clone()
    starts = layout.block_starts.tolist()
    cuts = layout.cu_blocks.tolist()
    seq = layout.cu_seqlens.tolist()
    pos = torch.arange(layout.num_tokens, device=q.device)
    for a, b, s, e in zip(cuts, cuts[1:], seq, seq[1:]):
        mine = ((rows >= s) & (rows < e)).nonzero()[:, 0]
        if not mine.numel():
            continue
        for h in range(H):
            sc = (q[mine, h].float() @ k[s:e, h // g].float().T) * scale
            sc = sc.masked_fill(pos[s:e][None] > rows[mine][:, None], -torch.inf)
            for n in range(a, b):
                part = sc[:, starts[n] - s : starts[n + 1] - s]
                mx[mine, h, n] = part.amax(1)
                lse[mine, h, n] = part.logsumexp(1)
    return mx, lse
