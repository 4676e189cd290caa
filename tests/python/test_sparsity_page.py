"""docs/SHIFTED_GROUPS.md: its tables and its recommendation follow from the recorded results."""

import pytest

import sparsity

pytestmark = pytest.mark.cpu_only


def step(ratio, unit="ms", tokens=65536):
    shape = {"model": "a shape", "tokens": tokens, "layers": 8, "keep": 0.5, "block_size": 0.25}
    shape |= {"group_size": tokens // 4, "recompute": "layer"}
    row = {"bench": sparsity.BENCH, "shape": shape, "unit": unit, "ratio": ratio}
    row |= {"ours": 1000 * ratio, "peer_value": 1000.0, "gpu": "a GPU", "torch": "2"}
    return row | {"commit": "abc", "date": "2026-11-29"}


def run(method, perplexity, commit="abc"):
    settings = {"elimination": {"layerwise": {"group_size": 4096}}}
    shape = {"model": "small", "context": 16384, "steps": 80}
    row = {"method": method, "shape": shape, "seed": 0, "commit": commit, "equal": "steps"}
    perplexities = {"book": perplexity, "book_tail": perplexity}
    return row | {"perplexity": perplexities, "settings": settings, "kept_share": 0.5}


STEPS = [step(0.7), step(1.0, "GiB"), step(0.9, tokens=131072), step(1.0, "GiB", 131072)]


def test_the_page_is_what_the_results_say():
    text = sparsity.PAGE.read_text(encoding="utf-8")
    assert sparsity.updated(text, *sparsity.read_rows()) == text


@pytest.mark.parametrize(
    ("steps", "shares", "expected"),
    [
        (STEPS, {"groups-0.5": 1.005}, "**Use groups**"),
        (STEPS, {"groups-0.5": 1.005, "groups-0.3": 1.02}, "**Use groups with care**: groups-0.5"),
        (STEPS, {"groups-0.5": 1.02}, "**Leave `group_size` at null.**"),
        ([step(0.97)], {"groups-0.5": 0.99}, "**Leave `group_size` at null.**"),
        ([], {"groups-0.5": 0.99}, "Nothing is recommended yet"),
        (STEPS, {}, "Nothing is recommended yet"),
    ],
)
def test_the_recommendation_follows_from_time_and_quality(steps, shares, expected):
    rows = [run("tail-0.5", 10.0), run("tail-0.3", 10.0)]
    rows += [run(method, 10.0 * share) for method, share in shares.items()]
    found = sparsity.recommendation(steps, sparsity.quality_pairs(rows))
    assert found.startswith(expected)


def test_runs_of_one_commit_and_protocol_are_compared():
    rows = [run("tail-0.5", 10.0, "old"), run("groups-0.5", 11.0), run("dense", 9.0)]
    assert sparsity.quality_pairs(rows) == []
    rows.append(run("tail-0.5", 10.0))
    [(grouped, plain, shares)] = sparsity.quality_pairs(rows)
    assert (grouped["method"], plain["commit"]) == ("groups-0.5", "abc")
    assert shares["book"] == pytest.approx(1.1)
    assert "11.000 (1.1000)" in sparsity.quality_table([(grouped, plain, shares)])


def test_a_line_for_each_setting_and_the_latest_of_it():
    table = sparsity.step_table([step(0.5), step(1.0, "GiB"), *STEPS])
    lines = [line for line in table.splitlines() if line.startswith("| 65536") or "131072" in line]
    assert len(lines) == 2
    assert "0.70 (0.70)" in lines[0]
