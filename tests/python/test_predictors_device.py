"""lemo prepare and elimination by its predictors, on the device of the suite."""

import pytest
import torch

import lemo
from lemo import predictors
from lemo.preparation.pipeline import prepare
from lemo.preparation.windows import Window
from lemo.settings.preparation import PredictorSettings
from tiny_models import VOCABULARY, gradients, make_model

BLOCK, TOKENS, LAYERS = 8, 92, 3
SETTINGS = PredictorSettings(
    block_size=BLOCK,
    dense_layers=(0,),
    search_windows=1,
    keep=0.5,
    steps=6,
    windows_per_step=2,
    prune_every=2,
)


def windows(count, seed):
    g = torch.Generator("cpu").manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (count, TOKENS), generator=g, device="cpu")
    return [Window("a", row) for row in ids]


@pytest.mark.parametrize("policy", ["ratio", "threshold"])
def test_prepare_then_eliminate(tmp_path, policy):
    model = make_model("llama", dtype=torch.bfloat16)
    description = prepare(model, windows(3, 0), windows(2, 1), tmp_path / "predictor", SETTINGS)
    for layer in description["layers"]:
        assert 0 <= layer["attention"]["recall"] <= 1
    losses = description["threshold_search"]["losses"]
    assert losses == sorted(losses, reverse=True)

    config = lemo.LemoConfig(
        block_size=BLOCK,
        scorer="predictor",
        predictor=str(tmp_path / "predictor"),
        layerwise={"policy": policy, "dense_layers": (0,), "select_at": "all"},
    )
    handle = lemo.enable(model, config)
    ids = torch.stack([window.ids for window in windows(2, 2)]).to(torch.get_default_device())
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    first, *others = handle.statistics()
    assert first.attention_rows == 2 * TOKENS
    if policy == "ratio":
        # 12 blocks, the last of 4 tokens and always kept.
        assert [layer.attention_rows for layer in others] == [2 * (5 * BLOCK + 4)] * (LAYERS - 1)


def test_scores_are_those_of_the_cpu(tmp_path):
    model = make_model("llama", dtype=torch.bfloat16)
    prepare(model, windows(3, 0), windows(2, 1), tmp_path / "predictor", SETTINGS)
    here, there = (predictors.load(tmp_path / "predictor") for _ in range(2))
    layout = lemo.packing.blocks.BlockLayout.from_seqlens([TOKENS, 9], BLOCK)
    on_cpu = lemo.packing.blocks.BlockLayout.from_seqlens([TOKENS, 9], BLOCK, "cpu")
    x = torch.randn(layout.num_tokens, model.config.hidden_size).bfloat16()
    for kind in ("attention", "mlp"):
        scores = here.scores(2, kind, x, layout)
        expected = there.scores(2, kind, x.cpu(), on_cpu)
        assert scores.device.type == torch.get_default_device().type
        torch.testing.assert_close(scores.cpu(), expected, rtol=2e-2, atol=2e-2)
