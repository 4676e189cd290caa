"""A selector run over a few layers with scores that are drawn, and what the oracle keeps."""

import torch

from lemo import reference
from lemo.packing.blocks import BlockLayout
from lemo.selection.selector import Selector

LAYOUT = BlockLayout.from_seqlens([61, 8, 40], 8)


def run(config, num_layers=4, layout=LAYOUT, folder=None, progress=0.0, labelled=None):
    """({(layer, kind): kept blocks}, the (layer, kind) pairs that were scored, the selector)."""
    config = config.resolved(answers=False).of_predictors(None, folder)
    selector = Selector(config, num_layers)
    selector.set_progress(progress)
    selector.begin(layout, labelled)
    kept, scored = {}, []
    for layer in range(num_layers):
        for kind in ("attention", "mlp"):

            def score(layer=layer, kind=kind):
                assert not torch.is_grad_enabled()
                scored.append((layer, kind))
                return scores_of(layer, kind, layout)

            blocks = selector.select(layer, kind, score).kept_blocks
            kept[layer, kind] = None if blocks is None else blocks.tolist()
    return kept, scored, selector


def scores_of(layer, kind, layout=LAYOUT):
    generator = torch.Generator("cpu").manual_seed(2 * layer + (kind == "mlp"))
    scores = torch.rand(layout.num_blocks, generator=generator, device="cpu")
    return scores.to(layout.block_starts.device)


def cut(layer, kind, policy, value, keep_first=1, keep_last=1, layout=LAYOUT):
    """Kept blocks by the oracle."""
    blocks = reference.token_select(
        scores_of(layer, kind, layout),
        layout.block_starts,
        layout.cu_blocks,
        policy,
        value,
        keep_first,
        keep_last,
    )[3].tolist()
    return None if len(blocks) == layout.num_blocks else blocks
