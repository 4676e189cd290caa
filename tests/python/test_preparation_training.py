"""Modules, exact scores, objective and elastic size of the predictors."""

import itertools
import math

import pytest
import torch

from lemo import reference
from lemo.packing.blocks import BlockLayout
from lemo.predictors.modules import make_predictor
from lemo.predictors.position import PositionProfile, contested_blocks, query_blocks
from lemo.preparation.elastic import ElasticSize
from lemo.preparation.exact_scores import FeatureStore, SubBlockData
from lemo.preparation.ranking import Budget, kept_set_recall, ranking_loss
from lemo.preparation.training import fit
from lemo.selection.scorers.paper.exact import mlp_token_scores, token_means
from lemo.settings.preparation import PredictorSettings
from limits import largest_file

HIDDEN, BLOCK = 24, 8

# Features lie on the CPU; test_predictors_device.py prepares a model on the device of the suite.
pytestmark = pytest.mark.cpu_only


def generator(seed=0):
    return torch.Generator("cpu").manual_seed(seed)


def planted(kind, windows=32, blocks=20, seed=0, trend=0.0):
    """Windows whose scores are block means of max(x . u, 0), plus a trend over the places."""
    g = generator(seed)
    direction = torch.randn(HIDDEN, generator=generator(99)) / HIDDEN**0.5
    data = SubBlockData([], [], [], [])
    for _ in range(windows):
        # A ragged last block in every window.
        layout = BlockLayout.from_seqlens([blocks * BLOCK - 3], BLOCK)
        strength = torch.randn(layout.num_blocks, 1, generator=g)
        strength = strength.repeat_interleave(layout.block_starts.diff().long(), 0)
        x = torch.randn(layout.num_tokens, HIDDEN, generator=g) + strength * direction
        tokens = torch.relu(x.bfloat16().float() @ direction)
        place = trend * torch.linspace(0, 1, layout.num_blocks)
        data.x.append(x.bfloat16())
        data.scores.append(token_means(tokens, layout) + place)
        data.layouts.append(layout)
        if kind == "mlp":
            data.token_scores.append(tokens)
    return data


def profile_of(data, flat):
    free = [contested_blocks(layout, 1, 1) for layout in data.layouts]
    return PositionProfile.fit(
        torch.cat([y[f] for y, f in zip(data.scores, free)]),
        torch.cat([query_blocks(layout)[f] for layout, f in zip(data.layouts, free)]),
        flat,
    )


def mean_recall(module, profile, data, keep):
    recalls = []
    for x, exact, layout in zip(data.x, data.scores, data.layouts):
        with torch.no_grad():
            scores = profile.restore(module(x.float(), layout), layout)
        recalls += kept_set_recall(scores, exact, layout, Budget(keep, 1, 1))
    return sum(recalls) / len(recalls)


def run_fit(kind, settings, seed=0, trend=0.0):
    data = planted(kind, trend=trend)
    profile = profile_of(data, flat=kind == "mlp")
    g = generator(seed)
    module = make_predictor(kind, HIDDEN, 8, g)
    result = fit(module, data, profile, settings, g)
    return module, profile, result


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_module_computes_the_reference(kind):
    module = make_predictor(kind, HIDDEN, 6, generator())
    layout = BlockLayout.from_seqlens([3 * BLOCK + 2, BLOCK], BLOCK)
    x = torch.randn(layout.num_tokens, HIDDEN, generator=generator(1))
    query = module.query.weights if kind == "attention" else (None,) * 3
    expected = reference.predictor(
        x, *module.key.weights, *query, layout.block_starts, layout.cu_blocks
    )
    torch.testing.assert_close(module(x, layout), expected, rtol=2e-5, atol=1e-6)
    (module(x, layout).square().sum()).backward()
    got = [p.grad for p in module.parameters()]
    wanted = torch.autograd.grad(expected.square().sum(), list(module.parameters()))
    for g, w in zip(got, wanted):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6)


def test_planted_structure_is_learnt():
    settings = PredictorSettings(keep=0.5, steps=120, windows_per_step=4, learning_rate=3e-2)
    for kind in ("attention", "mlp"):
        module, profile, result = run_fit(kind, settings)
        test = planted(kind, windows=16, seed=1)
        fresh = make_predictor(kind, HIDDEN, 8, generator(5))
        assert mean_recall(module, profile, test, 0.5) >= 0.9
        assert mean_recall(fresh, profile, test, 0.5) <= 0.75
        assert sum(result.losses[-10:]) < 0.5 * sum(result.losses[:10])


def test_place_explains_what_content_does_not():
    settings = PredictorSettings(keep=0.5, steps=100, windows_per_step=4, learning_rate=3e-2)
    module, profile, _ = run_fit("attention", settings, trend=3.0)
    test = planted("attention", windows=16, seed=1, trend=3.0)
    assert mean_recall(module, profile, test, 0.5) >= 0.9


def test_training_is_deterministic():
    settings = PredictorSettings(steps=12, prune_every=4, prune_to=0.5)
    first, _, a = run_fit("attention", settings)
    second, _, b = run_fit("attention", settings)
    third, _, _ = run_fit("attention", settings, seed=1)
    assert a == b
    for one, two in zip(first.parameters(), second.parameters()):
        assert torch.equal(one, two)
    assert not torch.equal(first.key.up[0, :1], third.key.up[0, :1])


def test_recall_counts_free_blocks_of_each_sequence():
    layout = BlockLayout.from_seqlens([6 * BLOCK, 2 * BLOCK, 6 * BLOCK], BLOCK)
    exact = torch.tensor([9, 4, 3, 2, 1, 9, 1, 2, 9, 1, 2, 3, 4, 9.0])
    guess = torch.tensor([0, 4, 1, 3, 2, 0, 1, 2, 0, 4, 3, 2, 1, 0.0])
    # Of 6 blocks half are kept: 2 forced and 1 of 4 free; of 2 blocks nothing is free.
    assert kept_set_recall(guess, exact, layout, Budget(0.5, 1, 1)) == [1.0, 0.0]
    # Two of four free: {1, 2} against {1, 3}; {3, 4} against {1, 2}.
    assert kept_set_recall(guess, exact, layout, Budget(0.66, 1, 1)) == [0.5, 0.0]
    assert kept_set_recall(guess, exact, layout, Budget(1.0, 1, 1)) == []


def test_ranking_loss_sees_the_boundary_only():
    layout = BlockLayout.from_seqlens([12 * BLOCK], BLOCK)
    half = Budget(0.5, 1, 1)
    exact = torch.linspace(10, -10, 12)
    right = ranking_loss(exact, exact, layout, half)
    swapped = exact.clone()
    swapped[[4, 5]] = exact[[5, 4]]  # across the cut: 4 of 10 free blocks are kept
    inside = exact.clone()
    inside[[1, 2]] = exact[[2, 1]]  # both are kept
    assert ranking_loss(swapped, exact, layout, half) > 1.5 * right
    torch.testing.assert_close(ranking_loss(inside, exact, layout, half), right, rtol=0.2, atol=0)
    assert ranking_loss(exact, exact, layout, Budget(1.0, 1, 1)) == 0


def test_ranking_loss_is_the_weighted_mean_over_pairs():
    layout = BlockLayout.from_seqlens([6 * BLOCK], BLOCK)
    exact = torch.tensor([0.0, 4, 3, 2, 1, 0])
    guess = torch.tensor([0.0, 0.3, -0.2, 0.9, 0.4, 0], requires_grad=True)
    kept, dropped = [-0.2, 0.3], [0.9, 0.4]  # nearest to the cut first, two of four free blocks
    e = torch.exp(torch.tensor(-1.0))
    weights = [[1, e], [e, e * e]]
    total = sum(
        weights[a][b] * torch.log1p(torch.exp(torch.tensor(dropped[b] - kept[a])))
        for a in range(2)
        for b in range(2)
    )
    loss = ranking_loss(guess, exact, layout, Budget(0.66, 1, 1))
    torch.testing.assert_close(loss, total / (1 + e) ** 2)
    loss.backward()
    assert (guess.grad[1:3] < 0).all()
    assert (guess.grad[3:5] > 0).all()
    assert guess.grad[0] == guess.grad[5] == 0


def test_a_profile_ranks_the_places_of_longer_sequences_too():
    seen_by = torch.arange(1, 17).repeat(4)
    exact = 5.0 - torch.log2(seen_by.float()) + 0.01 * torch.randn(64, generator=generator())
    profile = PositionProfile.fit(exact, seen_by)
    layout = BlockLayout.from_seqlens([64 * BLOCK], BLOCK)
    mean, deviation = profile.at(layout, torch.device("cpu"))
    assert (mean.diff() > 0).all(), "later blocks are seen from nearer"
    expected = 5.0 - torch.log2(query_blocks(layout).float())
    torch.testing.assert_close(mean, expected, rtol=0, atol=0.1)
    assert (deviation > 0).all()


def test_profile_recovers_a_trend_and_inverts():
    layout = BlockLayout.from_seqlens([40 * BLOCK, 17 * BLOCK - 1], BLOCK)
    seen_by = query_blocks(layout)
    assert seen_by[[0, 39, 40, 56]].tolist() == [40, 1, 17, 1]
    g = generator()
    noise = torch.randn(50, layout.num_blocks, generator=g)
    trend = 5 - seen_by.float().log2()
    exact = trend + 0.5 * noise
    profile = PositionProfile.fit(exact.flatten(), seen_by.repeat(50))
    content = profile.standardise(exact[0], layout)
    torch.testing.assert_close(profile.restore(content, layout), exact[0])
    torch.testing.assert_close(profile.restore(0 * content, layout), trend, rtol=0, atol=0.25)
    residual = torch.stack([profile.standardise(row, layout) for row in exact])
    assert 0.9 < residual.std() < 1.1
    flat = PositionProfile.fit(exact.flatten(), seen_by.repeat(50), flat=True)
    assert flat.mean.shape == (1,)
    torch.testing.assert_close(flat.mean[0], exact.mean())


def test_pruning_keeps_module_and_optimizer_together():
    module = make_predictor("attention", HIDDEN, 8, generator())
    with torch.no_grad():
        module.key.down[[1, 5]] = 0.0  # dead units of the first layer
        module.key.mid[2] = -module.key.mid[2].abs()  # a dead one of the second
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    layout = BlockLayout.from_seqlens([12 * BLOCK], BLOCK)
    x = torch.randn(layout.num_tokens, HIDDEN, generator=generator(1))

    def step():
        optimizer.zero_grad()
        (module(x, layout) - 1).square().mean().backward()
        optimizer.step()

    optimizer.param_groups[0]["lr"] = 0.0
    step()
    before = module(x, layout).detach()
    moments = {name: optimizer.state[p]["exp_avg"] for name, p in module.named_parameters()}
    elastic = ElasticSize(module, optimizer, zero_share=0.99, target=None)
    elastic.count(x)
    assert elastic.prune(1.0) == 3
    assert module.key.down.shape == (6, HIDDEN)
    assert module.key.mid.shape == (7, 6)
    assert module.key.up.shape == (8, 7)
    # Units that are always zero leave the function as it was.
    torch.testing.assert_close(module(x, layout), before)

    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}
    assert len(optimizer.state) == len(list(module.parameters()))
    alive = [0, 2, 3, 4, 6, 7]
    torch.testing.assert_close(
        optimizer.state[module.key.down]["exp_avg"], moments["key.down"][alive]
    )
    torch.testing.assert_close(
        optimizer.state[module.key.mid]["exp_avg"],
        moments["key.mid"][[0, 1, 3, 4, 5, 6, 7]][:, alive],
    )

    optimizer.param_groups[0]["lr"] = 1e-2
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    loss = (module(x, layout) - 1).square().mean().item()
    for _ in range(5):
        step()
    for name, p in module.named_parameters():
        assert not torch.equal(p, weights[name]), name
    assert (module(x, layout) - 1).square().mean().item() < loss


def test_pruning_to_a_target_drops_the_least_useful():
    module = make_predictor("mlp", HIDDEN, 8, generator())
    with torch.no_grad():
        module.key.up[0, [0, 3, 6]] *= 1e-4  # hardly used downstream
    optimizer = torch.optim.AdamW(module.parameters())
    elastic = ElasticSize(module, optimizer, zero_share=1.0, target=5 / 8)
    x = torch.randn(64, HIDDEN, generator=generator(1))
    useful = module.key.up[:, [1, 2, 4, 5, 7]].detach().clone()
    elastic.count(x)
    elastic.prune(1.0)
    assert elastic.hidden_units == 10
    torch.testing.assert_close(module.key.up.detach(), useful)


def test_the_unit_that_is_missed_least_goes_and_the_others_take_over():
    net = make_predictor("mlp", HIDDEN, 6, generator())
    x = torch.randn(500, HIDDEN, generator=generator(1))
    hidden = [h.double() for h in net.key.hidden(x)]
    outgoing = [net.key.mid.detach().double(), net.key.up.detach().double()]

    def least_squares(layer, units):
        """(error, weights) of the best that the next layer can get from these units alone."""
        wanted = hidden[layer] @ outgoing[layer].T
        weights = torch.linalg.lstsq(hidden[layer][:, units], wanted).solution
        return (hidden[layer][:, units] @ weights - wanted).square().sum().item(), weights.T

    rows = net.key.down.detach().clone(), net.key.mid.detach().clone()
    elastic = ElasticSize(net, torch.optim.AdamW(net.parameters()), 1.0, target=5 / 6)
    elastic.count(x)
    elastic.prune(1.0)
    assert elastic.hidden_units == 10
    kept = [row for row in range(6) if any(torch.equal(rows[0][row], r) for r in net.key.down)]
    best = min(itertools.combinations(range(6), 5), key=lambda c: least_squares(0, list(c))[0])
    assert kept == list(best)
    expected = least_squares(0, kept)[1]
    found = [
        row
        for row in range(6)
        if any(torch.allclose(expected[row].float(), r, rtol=1e-2, atol=1e-3) for r in net.key.mid)
    ]
    assert len(found) == 5, "the rows of mid are not those of least squares"
    best = min(itertools.combinations(range(6), 5), key=lambda c: least_squares(1, list(c))[0])
    assert found == list(best)
    torch.testing.assert_close(
        net.key.up.detach().double(), least_squares(1, found)[1], rtol=1e-2, atol=1e-3
    )


def test_a_net_never_loses_its_last_unit():
    module = make_predictor("mlp", HIDDEN, 4, generator())
    with torch.no_grad():
        module.key.down.zero_()
    elastic = ElasticSize(module, torch.optim.AdamW(module.parameters()), 0.99, None)
    elastic.count(torch.randn(32, HIDDEN, generator=generator(1)))
    elastic.prune(1.0)
    assert [tuple(w.shape) for w in module.key.weights] == [(1, HIDDEN), (1, 1), (1, 1)]


def test_fit_prunes_to_the_target_and_still_learns():
    settings = PredictorSettings(
        steps=120, windows_per_step=4, learning_rate=3e-2, prune_every=20, prune_to=0.5
    )
    module, profile, result = run_fit("attention", settings)
    assert result.hidden_units[0] == 32
    assert result.hidden_units[1] <= 16
    assert mean_recall(module, profile, planted("attention", 16, seed=1), 0.5) >= 0.85


@pytest.mark.parametrize(("kind", "units"), [("attention", (32, 16)), ("mlp", (16, 12))])
def test_the_predictors_of_mlps_shrink_to_their_own_share(kind, units):
    settings = PredictorSettings(
        steps=6, windows_per_step=1, prune_every=2, prune_to=0.5, prune_mlp_to=0.75
    )
    _, _, result = run_fit(kind, settings)
    assert result.hidden_units == units


def test_a_training_shorter_than_the_interval_still_shrinks_to_the_target():
    settings = PredictorSettings(steps=6, windows_per_step=1, prune_every=50, prune_to=0.5)
    _, _, result = run_fit("attention", settings)
    assert result.hidden_units == (32, 16)


def test_scores_of_mlps_are_token_means():
    layout = BlockLayout.from_seqlens([2 * BLOCK + 3], BLOCK)
    activation = torch.randn(layout.num_tokens, 5, generator=generator())
    expected = [activation[a : a + BLOCK].abs().mean() for a in (0, BLOCK, 2 * BLOCK)]
    exact = token_means(mlp_token_scores(activation), layout)
    torch.testing.assert_close(exact, torch.stack(expected))


def test_feature_store_gives_back_what_was_added(tmp_path):
    store = FeatureStore(tmp_path, num_layers=2, hidden_size=HIDDEN, block_size=BLOCK)
    windows = [3 * BLOCK, 2 * BLOCK + 1]
    g = generator()
    kept = {}
    for tokens in windows:
        layout = BlockLayout.from_seqlens([tokens], BLOCK)
        visit = store.visit
        for layer in range(2):
            x = torch.randn(tokens, HIDDEN, generator=g)
            q, k = torch.randn(2, tokens, 2, 4, generator=g)
            activation = torch.randn(tokens, 6, generator=g)
            visit(layer, "attention", x, {"q": q, "k": k, "scale": 0.5}, layout)
            visit(layer, "mlp", x, {"activation": activation}, layout)
            exact = reference.block_scores(q, k, layout.block_starts, layout.cu_blocks, 0.5)
            kept[tokens, layer] = (x.bfloat16(), exact, activation)
        store.end_window(tokens)
    for layer in range(2):
        attention, mlp = store.read(layer, "attention"), store.read(layer, "mlp")
        for i, tokens in enumerate(windows):
            x, exact, activation = kept[tokens, layer]
            assert torch.equal(attention.x[i], x)
            torch.testing.assert_close(attention.scores[i], exact, rtol=2e-5, atol=1e-6)
            assert torch.equal(mlp.x[i], x)
            expected = token_means(mlp_token_scores(activation), mlp.layouts[i])
            torch.testing.assert_close(mlp.scores[i], expected)
        assert attention.token_scores == []
        assert mlp.subset([1]).token_scores[0].numel() == windows[1]
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert size == sum(windows) * FeatureStore.bytes_of_token(2, HIDDEN)


def test_feature_store_names_the_file_that_the_disk_does_not_take(tmp_path):
    store = FeatureStore(tmp_path, num_layers=1, hidden_size=HIDDEN, block_size=BLOCK)
    layout = BlockLayout.from_seqlens([BLOCK], BLOCK)
    with largest_file(10), pytest.raises(OSError, match=r"features\.0\.mlp\.bf16"):
        store.add(0, "mlp", torch.zeros(BLOCK, HIDDEN), torch.zeros(BLOCK), layout)


def test_feature_store_refuses_what_is_not_finite(tmp_path):
    store = FeatureStore(tmp_path, num_layers=1, hidden_size=HIDDEN, block_size=BLOCK)
    layout = BlockLayout.from_seqlens([BLOCK], BLOCK)
    x = torch.zeros(BLOCK, HIDDEN)
    with pytest.raises(ValueError, match="the exact scores of layer 0's mlp are not finite"):
        store.visit(0, "mlp", x, {"activation": torch.full((BLOCK, 4), torch.inf)}, layout)
    for name in ("q", "k"):
        heads = {"q": torch.ones(BLOCK, 2, 4), "k": torch.ones(BLOCK, 2, 4), "scale": 0.5}
        for wrong in (torch.nan, torch.inf, -torch.inf):
            heads[name][1, 0, 2] = wrong
            with pytest.raises(ValueError, match="the queries and keys of layer 0's attention are"):
                store.visit(0, "attention", x, heads, layout)
    with pytest.raises(ValueError, match=f"x: expected .*{HIDDEN}.*got"):
        store.add(0, "mlp", x[:, :3], torch.zeros(BLOCK), layout)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("keep", 0.0),
        ("keep", 1.0),
        ("steps", 0),
        ("windows_per_step", 0),
        ("learning_rate", 0.0),
        ("weight_decay", -1.0),
        ("rank_weight", -1.0),
        ("prune_every", -1),
        ("prune_zero_share", 0.0),
        ("prune_to", 1.5),
        ("prune_mlp_to", 0.0),
        ("keep_first", -1),
    ],
)
def test_bad_settings_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        PredictorSettings(**{name: value})


def test_an_mlp_whose_tokens_are_all_alike_trains_without_nan():
    data = planted("mlp", windows=2)
    alike = [torch.ones_like(exact) for exact in data.token_scores]
    data = SubBlockData(data.x, [torch.ones_like(y) for y in data.scores], data.layouts, alike)
    profile = profile_of(data, flat=True)
    module = make_predictor("mlp", HIDDEN, 8, generator())
    result = fit(module, data, profile, PredictorSettings(steps=2, windows_per_step=1), generator())
    assert all(math.isfinite(loss) for loss in result.losses)
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
