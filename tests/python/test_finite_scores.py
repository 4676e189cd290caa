"""Activations that are not finite, in rows that scorers would leave out: they are told of."""

import copy

import pytest
import torch

import lemo
from lemo.predictors.model import model_shape
from lemo.preparation.pipeline import prepare
from lemo.preparation.windows import Window
from lemo.relevance.heads import RetrievalHeads
from lemo.selection import finite
from lemo.selection import selector as selector_module
from lemo.settings.preparation import PredictorSettings
from tiny_models import flat_config, lora, make_ids, make_model

BLOCK = 8
IDS = make_ids(1, 64)
# What is broken has no label.
LABELS = IDS.where(torch.arange(64) >= 48, torch.tensor(-100))


class Breaking(torch.nn.Linear):
    """The last projection of an MLP, of which a row of the prompt has a number that is none."""

    wrong, row = torch.nan, 17

    def forward(self, x):
        y = super().forward(x).clone()
        if self.wrong is not None and y.shape[0] == 64:
            y[self.row, 3] = self.wrong
        return y


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "predictor"
    windows = [Window("a", make_ids(1, 64, seed)[0]) for seed in range(2)]
    settings = PredictorSettings(block_size=BLOCK, search_rounds=0, steps=2, keep=0.5)
    prepare(make_model("llama"), windows, windows, folder, settings)
    return str(folder)


def broken(wrong, scorer, predictor, **settings):
    """(model whose layer 1 breaks, its handle); its first layers are dense."""
    model = make_model("llama")
    layer = model.model.layers[1].mlp
    layer.down_proj.__class__ = Breaking
    layer.down_proj.wrong = wrong
    fixed = {"keep": 0.5, "block_size": BLOCK, "dense_layers": (0, 1), "select_at": "all"}
    if scorer == "predictor":
        settings["predictor"] = predictor
    config = flat_config(**fixed | {"scorer": scorer} | settings)
    return model, lemo.enable(model, config)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As there: scores are not waited for, and nan is the lowest of all."""
    select = selector_module.ops.token_select

    def selecting(scores, *others):
        return select(scores.nan_to_num(nan=-torch.inf), *others)

    monkeypatch.setattr(selector_module.ops, "token_select", selecting)
    monkeypatch.setattr(finite, "_is_waited_for", lambda tensor: False)


@pytest.mark.cpu_only
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("scorer", ["predictor", "exact", "pooled"])
def test_an_error_names_the_layer(scorer, wrong, predictor):
    model, _ = broken(wrong, scorer, predictor)
    with pytest.raises(FloatingPointError, match="layer 2: the scores of blocks for its attention"):
        model(IDS, labels=LABELS)


@pytest.mark.cpu_only
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("scorer", ["predictor", "exact", "pooled"])
def test_where_scores_are_not_waited_for_the_loss_is_nan(scorer, wrong, predictor, on_a_gpu):
    model, handle = broken(wrong, scorer, predictor)
    loss = model(IDS, labels=LABELS).loss
    assert loss.isnan()
    assert "layer 2: the scores of blocks for its attention are nan" in handle.reason_of_nan()
    loss.backward()
    # Behind the step that follows more is nan; what was first is named.
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = torch.nan
    assert model(IDS, labels=LABELS).loss.isnan()
    assert handle.reason_of_nan().startswith("layer 2:")


def with_a_broken_token(**settings):
    """(LoRA on a model whose frozen embedding has nan for a token, its handle)."""
    model = lora(make_model("llama"))
    with torch.no_grad():
        model.get_input_embeddings().weight[IDS[0, 40]] = torch.nan
    config = flat_config(**{"keep": 0.5, "block_size": BLOCK, "scorer": "pooled"} | settings)
    return model, lemo.enable(model, config)


@pytest.mark.cpu_only
def test_gradients_are_nan_where_the_loss_is(on_a_gpu):
    """As the model's own: with those of 0 a trainer would go on, and a GradScaler skip no step."""
    model, handle = with_a_broken_token(keep_first=2)
    first = IDS.where(torch.arange(64) < 16, torch.tensor(-100))
    model(input_ids=IDS, labels=first).loss.backward()
    assert handle.reason_of_nan().startswith("layer 0:")
    assert any(p.grad.isnan().any() for p in model.parameters() if p.grad is not None)


@pytest.mark.cpu_only
def test_where_no_label_is_kept_for_it_the_error_names_the_layer(on_a_gpu):
    model, _ = with_a_broken_token(keep_first=1, keep=0.25)
    with pytest.raises(FloatingPointError, match="layer 0: the scores of blocks for its attention"):
        model(input_ids=IDS, labels=LABELS)


@pytest.mark.cpu_only
@pytest.mark.parametrize("scorer", ["predictor", "exact", "pooled"])
def test_the_mlp_is_named_where_it_is_scored_first(scorer, predictor):
    model, _ = broken(None, scorer, predictor, keep_mlp=0.25)
    model.model.layers[2].self_attn.o_proj.register_forward_hook(lambda module, x, y: y - torch.inf)
    with pytest.raises(FloatingPointError, match="layer 2: the scores of blocks for its mlp are"):
        model(IDS, labels=LABELS)


@pytest.mark.cpu_only
@pytest.mark.parametrize("scorer", ["predictor", "exact", "pooled"])
def test_a_sound_model_keeps_what_it_kept(scorer, predictor, monkeypatch):
    found = []
    for looks in (True, False):
        if not looks:
            monkeypatch.setattr(
                finite.FiniteScores, "checked", lambda self, a, b, scores, c: scores
            )
        model, handle = broken(None, scorer, predictor, keep_mlp=0.25)
        loss = model(IDS, labels=LABELS).loss
        blocks = [(layer.attention_blocks, layer.mlp_blocks) for layer in handle.statistics()[2:]]
        assert handle.reason_of_nan() is None
        found.append((loss, blocks))
    (loss, blocks), (expected, expected_blocks) = found
    assert torch.equal(loss, expected)
    for pair, expected_pair in zip(blocks, expected_blocks):
        for kept, expected_kept in zip(pair, expected_pair):
            assert torch.equal(kept, expected_kept)
            assert kept.numel() < 8


@pytest.mark.cpu_only
def test_a_copied_model_has_its_own_findings(predictor, on_a_gpu):
    model, handle = broken(torch.nan, "predictor", predictor)
    other = copy.deepcopy(model)
    assert model(IDS, labels=LABELS).loss.isnan()
    other.model.layers[1].mlp.down_proj.wrong = None
    assert other(IDS, labels=LABELS).loss.isfinite()
    assert handle.reason_of_nan() is not None


@pytest.mark.cpu_only
def test_a_pass_of_text_forgets_nothing_of_one_of_answers(on_a_gpu, tmp_path):
    """Their settings differ; a training loop asks for a loss while later passes run."""
    model, path = make_model("llama"), tmp_path / "heads.json"
    RetrievalHeads(model_shape(model.config), ((0, 1),)).save(path)
    handle = lemo.enable(model, lemo.LemoConfig(scorer="attention", heads=str(path)))
    embedding = model.get_input_embeddings().weight.data
    sound, embedding[IDS[0, 3]] = embedding.clone(), torch.nan
    assert model(IDS, labels=LABELS).loss.isnan()
    embedding.copy_(sound)
    assert model(IDS, labels=IDS).loss.isfinite()
    assert handle.reason_of_nan().startswith("layer 0:")


def said_after(*passes):
    """(whether each pass is marked, what is named at the end); a pass: {layer: its score}."""
    scores, residual, marked = finite.FiniteScores(), torch.zeros(1, 1), []
    for each in passes:
        scores.begin()
        for layer, score in each.items():
            scores.checked(layer, "attention", torch.tensor([1.0, score]), residual)
        value = scores.marked(torch.tensor(1.0, dtype=torch.bfloat16))
        assert value.dtype == torch.bfloat16
        marked.append(bool(value.isnan()))
    return marked, scores.reason()


def test_the_layer_that_was_first_is_named(on_a_gpu):
    nan = torch.nan
    marked, reason = said_after({0: 1.0, 3: nan}, {0: nan, 3: nan})
    assert marked == [True, True]
    assert reason.startswith("layer 3:")
    # Other layers are scored where a schedule goes on.
    marked, reason = said_after({0: 1.0}, {1: 1.0, 2: nan})
    assert marked == [False, True]
    assert reason.startswith("layer 2:")
    marked, reason = said_after({0: 1.0, 1: nan}, {2: 1.0})
    assert marked == [True, False]
    assert reason.startswith("layer 1:")
    assert said_after({0: 1.0}, {1: 1.0, 2: 1.0}) == ([False, False], None)


def test_sums_of_many_values_in_fp16_are_not_taken_for_infinity():
    residual = torch.full((70, 1000), 2.0, dtype=torch.float16)
    scores = torch.rand(9)
    assert torch.equal(finite.FiniteScores().checked(0, "mlp", scores, residual), scores)
