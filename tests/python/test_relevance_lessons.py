"""What the predictor of relevance learns from: what answers need, and the loss."""

import pytest
import torch
from torch.nn.functional import normalize

from lemo.models.layers.architectures import architecture_of
from lemo.packing.blocks import BlockLayout
from lemo.predictors.model import model_shape
from lemo.preparation import relevance
from lemo.preparation.relevance import RelevanceWindow, _Lesson, _Lessons, _loss, _train
from lemo.relevance.answers import Answers
from lemo.relevance.heads import RetrievalHeads
from lemo.selection.scorers.relevance import predicted_relevance
from lemo.settings.preparation import PredictorSettings
from tiny_models import VOCABULARY, make_model
from tolerances import assert_close_fp32

pytestmark = pytest.mark.cpu_only

BLOCK, TOKENS = 16, 160
# Three answers, of which the second is so long that it counts as two. No label is in blocks 1 to 3.
RUNS = [(0, 2), (70, 140), (159, 160)]
NEEDED = (((5, 9),), ((16, 32), (50, 52)), ((20, 21), (80, 81)))


def silent(*_):
    return None


def window(needed=NEEDED, runs=RUNS, seed=0):
    ids = torch.randint(VOCABULARY, (TOKENS,), generator=torch.Generator("cpu").manual_seed(seed))
    labelled = torch.zeros(TOKENS, dtype=torch.bool)
    for first, end in runs:
        labelled[first:end] = True
    return RelevanceWindow("kind", ids, labelled, needed)


def shares_of(rows):
    """[A, B] from {block: share} of each answer."""
    shares = torch.zeros(len(rows), TOKENS // BLOCK)
    for row, found in zip(shares, rows):
        for block, share in found.items():
            row[block] = share
    return shares


def lessons(heads=None):
    return _Lessons(architecture_of(make_model("llama")), BLOCK, heads)


def test_known_needs_are_shared_among_the_open_blocks():
    [lesson] = lessons().of("training", [window()], silent)
    both = {1: 0.5, 3: 0.5}
    assert lesson.shares.tolist() == shares_of([{}, both, both, {1: 1.0}]).tolist()


def test_every_answer_says_what_it_needs():
    message = "training: expected what each of 3 answers needs, got 2 entries"
    with pytest.raises(ValueError, match=message):
        lessons().of("training", [window(NEEDED[:2])], silent)


def test_windows_that_need_nothing_teach_nothing():
    nothing = window((((100, 110),),), [(70, 72)])  # behind the answer
    with pytest.raises(ValueError, match="held_out: expected windows with answers that need .* 2$"):
        lessons().of("held_out", [nothing, nothing], silent)
    [lesson] = lessons().of("held_out", [nothing, window()], silent)
    assert lesson.shares.shape[0] == 4


def test_looks_are_the_mean_over_the_heads():
    """Against the weights that Transformers' eager attention gives."""
    model = make_model("llama", dtype=torch.float32, max_position_embeddings=TOKENS)
    example = window(None, [(60, 62), (140, 144)])
    with torch.no_grad():
        weights = model(example.ids[None], output_attentions=True).attentions
    heads = ((0, 1), (0, 3), (2, 2))
    found = RetrievalHeads(model_shape(model.config), heads)
    [lesson] = _Lessons(architecture_of(model), BLOCK, found).of("training", [example], silent)
    with_labels = [3, 8]
    for shares, (first, end) in zip(lesson.shares, [(60, 62), (140, 144)]):
        of_heads = []
        for layer, head in heads:
            largest = weights[layer][0, head, first:end].unflatten(-1, (-1, BLOCK)).amax((0, -1))
            largest[with_labels] = 0
            of_heads.append(largest / largest.sum())
        expected = torch.stack(of_heads).mean(0)
        expected[first // BLOCK :] = 0
        assert_close_fp32(shares, expected / expected.sum())


def test_looks_at_next_to_nothing_teach_nothing(monkeypatch):
    looks = shares_of([{1: 3e-7, 2: 3e-7}, {1: 0.25, 2: 0.25, 9: 0.5}])
    monkeypatch.setattr(_Lessons, "_looked_at", lambda *_: looks)
    heads = RetrievalHeads({}, ((0, 0),))
    [lesson] = lessons(heads).of("training", [window(None, [(70, 72), (90, 91)])], silent)
    assert lesson.shares.tolist() == shares_of([{}, {1: 0.5, 2: 0.5}]).tolist()


SETTINGS = PredictorSettings(
    target="relevance",
    block_size=BLOCK,
    rank=8,
    steps=1,
    windows_per_step=2,
    learning_rate=1e-12,
    weight_decay=0.0,
    prune_every=0,
)


def trained(windows, **changes):
    """(model, lessons, predictor, losses)."""
    model = make_model("llama", dtype=torch.float32)
    architecture = architecture_of(model)
    taught = _Lessons(architecture, BLOCK, None).of("training", windows, silent)
    settings = PredictorSettings(**SETTINGS.to_dict() | changes)
    return model, taught, *_train(architecture, taught, settings, silent)


def different_tokens(model, windows):
    embed = model.get_input_embeddings()
    return torch.cat([embed(each.ids.unique()) for each in windows]).detach()


def test_features_are_of_one_size_and_nothing_is_common_to_all():
    windows = [window(seed=seed) for seed in range(40)]
    model, _, predictor, _ = trained(windows)
    tokens = different_tokens(model, windows[:32])
    assert_close_fp32(predictor.scale, 1 / tokens.std(0))
    for _, net in predictor.nets():
        hidden = torch.relu(torch.relu(tokens * predictor.scale @ net.down.T) @ net.mid.T)
        common = normalize(hidden.mean(0), dim=0)
        assert (net.up @ common).abs().max() < 1e-4 * net.up.abs().max()


def test_the_loss_is_the_cross_entropy_of_what_is_needed():
    """Of answers that need something, the mean; of the windows of a step, the mean."""
    model, [lesson, _], predictor, losses = trained([window(), window()])
    x = model.get_input_embeddings()(lesson.window.ids).detach()
    layout = BlockLayout.from_seqlens([TOKENS], BLOCK)
    [predicted] = predicted_relevance(predictor, x, layout, [lesson.answers])
    expected = []
    for shares, found in zip(lesson.shares.tolist(), predicted):
        needed = {block: share for block, share in enumerate(shares) if share}
        if needed:
            expected.append(-sum(share * found[block].log() for block, share in needed.items()))
    expected = torch.stack(expected).mean()
    assert_close_fp32(_loss(predictor, x, lesson, BLOCK), expected)
    assert_close_fp32(torch.tensor(losses), expected[None])


def test_the_learning_rate_follows_its_schedule(monkeypatch):
    monkeypatch.setattr(relevance, "schedule", lambda step, steps: float(step == steps - 1))
    _, _, predictor, losses = trained([window(), window()], steps=3, learning_rate=0.1)
    assert losses[0] == losses[1] == losses[2]
    _, _, first, _ = trained([window(), window()])
    assert not torch.equal(predictor.query.up, first.query.up)


def test_units_are_counted_on_features_of_one_size():
    """Those that are zero for a share of the tokens go."""
    model, _, whole, _ = trained([window()], windows_per_step=1)
    [of_window] = [model.get_input_embeddings()(window().ids).detach() * whole.scale]
    share = 0.6
    changes = {"windows_per_step": 1, "prune_every": 1, "prune_zero_share": share}
    _, _, pruned, _ = trained([window()], **changes)
    for (_, net), (_, left) in zip(whole.nets(), pruned.nets()):
        first = torch.relu(of_window @ net.down.T)
        second = torch.relu(first @ net.mid.T)
        used = [(hidden == 0).float().mean(0) < share for hidden in (first, second)]
        assert [left.down.shape[0], left.mid.shape[0]] == [int(each.sum()) for each in used]
        assert left.down.shape[0] < net.down.shape[0]


def test_what_is_measured_is_what_is_stored(tmp_path, monkeypatch):
    from lemo.predictors.storage import load_relevance

    measured, describe = [], relevance._describe

    def note(architecture, predictor, *rest):
        measured.append(predictor)
        return describe(architecture, predictor, *rest)

    monkeypatch.setattr(relevance, "_describe", note)
    model = make_model("llama")
    windows = [window(), window(seed=1)]
    found = relevance.prepare_relevance(model, windows, windows, tmp_path / "out", SETTINGS)
    assert found["loss"] == pytest.approx(trained(windows)[3][0])
    stored = dict(load_relevance(tmp_path / "out").named_parameters())
    for name, parameter in measured[0].named_parameters():
        assert torch.equal(parameter, stored[name].float())
        assert not stored[name].requires_grad


def test_recall_is_of_answers_that_need_something():
    lesson = _Lesson(window(), Answers((70, 159), (72, 160)), shares_of([{}, {3: 1.0}]))
    settings = PredictorSettings(target="relevance", block_size=BLOCK, keep=0.3)
    scores = shares_of([{3: 1.0}])[0]
    assert relevance._held(scores, lesson, settings) == 1.0
