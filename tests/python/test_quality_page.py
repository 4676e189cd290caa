"""docs/QUALITY.md: its sentences and its caption follow from the recorded runs."""

import json
import re
import statistics
from pathlib import Path

import pytest
import yaml

import quality_page
from common.methods import in_numbers
from lemo import LemoConfig
from lemo.settings.elimination import LayerwiseConfig
from quality_table import protocol_of, share_of

# The figures of a page.
pytestmark = pytest.mark.cpu_only

ROOT = Path(__file__).resolve().parents[2]
ROWS = quality_page.read_rows()
METHODS = yaml.safe_load((ROOT / "benchmarks/quality.yaml").read_text(encoding="utf-8"))
WINDOWS = {16384: 8, 32768: 4, 65536: 2}
PROTOTYPES = {("computed16-0.3", 32768, 160), ("computed8-0.5", 16384, 400)}
# Defaults of the first round, which its rows leave out.
FIRST_ROUND = {"block_size": 64, "keep_first": 1}


def words(path):
    return " ".join((ROOT / path).read_text(encoding="utf-8").split())


PAGE = words("docs/QUALITY.md")


def runs(method, context=16384, steps=160, rate=2e-3, copies=False, equal="steps"):
    protocol = (context, steps, WINDOWS[context], rate, copies, equal)
    found = [row for row in ROWS if protocol_of(row) == protocol]
    found = [row for row in found if row["method"] == method]
    assert found, f"no run of {method} {protocol}"
    return found


def behind(method, context=16384, steps=160, kinds=None, **protocol):
    """Percent over dense LoRA's perplexity: books, their tails, TeX, its tails."""
    rows = runs(method, context, steps, **protocol)
    dense = runs("dense", context, steps, **{**protocol, "equal": "steps"})
    kinds = kinds or list(rows[0]["perplexity"])
    return [100 * (share_of(rows, dense, kind) - 1) for kind in kinds]


def span(*values, digits=1):
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


def mean(method, field, context=16384, steps=160, **protocol):
    """Of the runs that had an H200 alone."""
    rows = runs(method, context, steps, **protocol)
    alone = [row for row in rows if row["runs_at_a_time"] == 1 and "H200" in row["gpu"]]
    return statistics.mean(row[field] for row in alone)


def time_of(method, other, context=16384, steps=160, field="step_seconds"):
    return mean(method, field, context, steps) / mean(other, field, context, steps)


def less(first, second, digits=1):
    """Points of ``first`` beyond ``second``, the smallest and the largest."""
    return span(*(a - b for a, b in zip(first, second)), digits=digits)


FIRST = {"steps": 100, "rate": 1e-3}
TAILS, BOOKS, TEX = ["book_tail", "tex_tail"], ["book", "book_tail"], ["tex", "tex_tail"]
LONG = {"steps": 400, "rate": 4e-3, "copies": True}


def sentences():
    """What the page has to say, with the figures of the recorded runs."""
    tail, wide, burn = behind("tail-0.5"), behind("tail-0.5", 32768), behind("burn-0.3")
    timed = {
        (name, context): [-value for value in behind(name, context, steps, equal="time")]
        for name in ("tail-0.5", "burn-0.3")
        for context, steps in ((16384, 160), (32768, 100))
    }
    yield (
        f"half of the tokens are {span(*timed['tail-0.5', 16384])}% below the perplexity of dense "
        f"LoRA and three tenths {span(*timed['burn-0.3', 16384])}%; in that of 100 steps at 32768 "
        f"tokens, {span(*timed['tail-0.5', 32768])}% and {span(*timed['burn-0.3', 32768])}%"
    )
    yield (
        f"within {max(behind('computed-0.5')):.1f}% of dense LoRA at 16384 and within "
        f"{max(behind('computed8-0.5', 32768)):.1f}% (eighths, two runs) to "
        f"{max(behind('computed-0.5', 32768)):.1f}% (quarters) at 32768"
    )
    memory = time_of("computed-0.5", "dense", field="peak_memory_gib")
    yield f"in {time_of('computed-0.5', 'dense'):.2f} of its time and {memory:.2f} of its memory"
    longer = [time_of("computed-0.5", "tail-0.5", context) for context in (16384, 32768)]
    yield f"A step takes {longer[0]:.1f} (16384) to {longer[1]:.1f} times (32768) that of leaving"
    even = {context: behind("even16-0.3", context) for context in (16384, 32768)}
    yield (
        f"are {span(*even[16384][:2], *even[32768][:2])}% behind on books; on TeX they are "
        f"{span(*even[16384][2:])}% behind at 16384 and {span(*even[32768][2:])}% at 32768"
    )
    far = {name: behind(name, 65536, 100) for name in ("tail-0.5", "computed8-0.5")}
    yield f"left out, are {span(*far['tail-0.5'])}% behind dense LoRA after as many steps"
    yield f"did not help there (computed8-0.5, {span(*far['computed8-0.5'])}% behind)"
    half, tenths = [
        [
            time_of(name, "dense", 32768, 100, field=field)
            for field in ("step_seconds", "peak_memory_gib")
        ]
        for name in ("twice-0.5", "twice-0.3")
    ]
    yield f"a step takes {tenths[0]:.2f} of the time and {tenths[1]:.2f} of the memory"
    yield f"({half[0]:.2f} of the time and {half[1]:.2f} of the memory)"
    twice = behind("twice-0.3")
    yield f"within {max(twice[:2]):.1f}% of dense LoRA on books and {max(twice[2:]):.1f}% on TeX"
    yield f"tokens half of the tokens cost {span(*behind('drop64', **FIRST))}% of perplexity"
    yield f"quarter of the window {span(*behind('drop4096', **FIRST))}% (the plot"
    yield f"it is {span(*tail)}% at 16384 and {span(*wide)}% at 32768 tokens"
    own = behind("paper", **FIRST) + behind("layers2048", **FIRST)
    yield f"half or more: {span(*(1 + value / 100 for value in own))} times the perplexity"
    each, one = behind("each-0.3"), behind("computed16-0.3")
    yield f"it costs {span(*each)}% with three tenths, in place of {span(*one)}%"
    narrow = {context: behind("tail-0.3", context, kinds=TAILS) for context in (16384, 32768)}
    gains = [
        before - after
        for context, values in narrow.items()
        for before, after in zip(values, behind("burn-0.3", context, kinds=TAILS))
    ]
    yield f"makes the tails better by {span(*gains)} points"
    changed = [behind("tail-0.5-b4", context) for context in (16384, 32768)]
    seed = [first_seed("tail-0.5", context) for context in (16384, 32768)]
    books = [old[1] - new[1] for old, new in zip(seed, changed)]
    worse = max(new[i] - old[i] for old, new in zip(seed, changed) for i in (2, 3))
    yield f"the tails of books {span(*books)} points better and TeX up to {worse:.1f} points worse"

    def shares(*values):
        return span(*(1 + value / 100 for value in values), digits=3)

    tails = {
        name: behind(name, kinds=TAILS)
        for name in ("computed-0.5", "tail-0.5", "computed-0.3", "computed16-0.3", "burn-0.3")
    }
    yield (
        f"the tails end at {shares(*tails['computed-0.5'])} of dense LoRA instead of "
        f"{shares(*tails['tail-0.5'])} (16384), and with three tenths at "
        f"{shares(*tails['computed-0.3'], *tails['computed16-0.3'])} instead of "
        f"{shares(*tails['burn-0.3'])} (burn-0.3)"
    )
    short = [
        value - best
        for name in ("computed64-0.3", "computed256-0.3")
        for value, best in zip(behind(name), one)
    ]
    yield f"blocks of 64 or 256 tokens are {span(*short)} points behind blocks of 1024"
    labels = {16384: behind("labels-0.3"), 32768: behind("labels-0.3", 32768)}
    yield (
        f"(labels-0.5) is {span(*behind('labels-0.5'))}% behind dense LoRA, with that of three "
        f"tenths (labels-0.3) {span(*labels[16384])}% at 16384 and {span(*labels[32768])}% at 32768"
    )
    yield f"do not see: {less(tail, behind('labels-0.5'))} points for half of the tokens (tail-0.5)"
    yield f"and {less(burn, labels[16384])} points for three tenths (burn-0.3) at 16384"
    price = {
        context: max(
            value - label
            for name in ("computed16-0.3", "even16-0.3")
            for value, label in zip(behind(name, context), labels[context])
        )
        for context in labels
    }
    yield f"then up to {price[16384]:.1f} points (32768: {price[32768]:.1f}) behind the price"
    cheap = burn + behind("burn-0.3", 32768) + behind("burn-0.3", 32768, 100)
    yield f"at equal steps the result is {span(*cheap)}% behind dense LoRA"
    rates = behind("drop2048-last", **FIRST) + behind("spans-0.5")
    yield f"stayed {span(*rates, *behind('spans-0.5', rate=4e-3))}% behind; at 8e-3"
    fast = behind("spans-0.5", rate=8e-3) + behind("tail8-0.5", rate=8e-3)
    yield f"they were {span(*fast)}% behind"
    few = [
        100 * (row["perplexity"][kind] / runs("dense", **FIRST)[0]["perplexity"][kind] - 1)
        for row in ROWS
        if row["method"] == "dense-b4"
        for kind in row["perplexity"]
    ]
    yield (
        f"{span(*few)}% behind instead of {span(*behind('drop4096', **FIRST))}%, after 100 steps "
        "at learning rate 0.001"
    )


def recommendations():
    """Rows of the first table: settings, perplexity, time and memory of a step."""
    for settings, method in (
        ("`LemoConfig(keep=0.5)`", "tail-0.5"),
        ('`LemoConfig(keep=0.5, visible_keys="computed")`', "computed-0.5"),
        ("`LemoConfig(keep=0.28, block_size=1 / 7, burn_in=0.25)`", "burn-0.3"),
        (
            '`LemoConfig(keep=0.3, block_size=1 / 16, keep_last=0, visible_keys="computed")`',
            "even16-0.3",
        ),
    ):
        fields = ("step_seconds", "peak_memory_gib")
        seconds, memory = [time_of(method, "dense", field=field) for field in fields]
        yield f"{settings} | {span(*behind(method))}% behind | {seconds:.2f} and {memory:.2f}"
    timed = [-value for value in behind("tail-0.5", equal="time")]
    (run,) = runs("tail-0.5", equal="time")
    yield (
        f"{run['shape']['steps']} steps are possible at 16384 tokens, and the result is "
        f"{span(*timed)}% better than dense LoRA's"
    )


def first_seed(method, context):
    dense = runs("dense", context)
    alone = [row for row in runs(method, context) if (row["seed"], row["runs_at_a_time"]) == (0, 1)]
    return [100 * (share_of(alone, dense, kind) - 1) for kind in alone[0]["perplexity"]]


def test_sentences_follow_from_the_runs():
    missing = [sentence for sentence in (*recommendations(), *sentences()) if sentence not in PAGE]
    assert not missing, "\n".join(missing)


def test_the_readme_says_what_the_runs_say():
    timed = [-value for value in behind("tail-0.5", equal="time")]
    (run,) = runs("tail-0.5", equal="time")
    time = run["training_seconds"] / mean("dense", "training_seconds")
    assert (
        f"perplexity was {span(*behind('tail-0.5'))}% above that of dense LoRA (LoRA on every "
        "token) after the same 160 steps (mean of five runs). Trained for "
        f"{time:.2f} times as long as dense LoRA, it was {span(*timed)}% below (one run)"
    ) in words("README.md")
    assert len(runs("tail-0.5")) == 5


def test_retrieval_by_depth_is_that_of_the_runs():
    lines = re.findall(
        r"^\| (\S+?)(?: LoRA)?, (\d+) steps( \(prototype\))? \| (.*) \|$",
        (ROOT / "docs/QUALITY.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert len(lines) == 7
    for method, steps, prototype, cells in lines:
        (row,) = [
            row
            for row in ROWS
            if row["shape"].get("copies")
            and (row["method"], row["shape"]["steps"]) == (method, int(steps))
            and row["shape"]["learning_rate"] == 4e-3
        ]
        depths = ["none", "0", "0.25", "0.5", "0.75", "0.95"]
        shown = [format(row["retrieval"][depth], ".1f") for depth in depths]
        assert cells.split(" | ") == shown, method
        assert bool(prototype) == ("prototype" in row["commit"]), method


def shown_runs():
    for protocol in quality_page.PROTOCOLS:
        for row in ROWS:
            if protocol_of(row) == protocol and row["method"] in quality_page.SHOWN:
                yield protocol, row


def test_the_caption_names_what_runs_do_not_have_in_common():
    shown = [row for _, row in shown_runs()]
    assert {row["shape"]["lora_rank"] for row in shown} == {16}
    assert {row["torch"].partition("+")[0] for row in shown} == {"2.11.0"}
    late = [row["method"] for row in shown if row["date"] == "2026-11-30"]
    assert late == ["tail-0.5"]
    dates = {(row["shape"]["learning_rate"] == 1e-3, row["date"]) for row in shown}
    assert dates == {(True, "2026-11-27"), (False, "2026-11-28"), (False, "2026-11-30")}
    prototypes = {
        (row["method"], row["shape"]["context"], row["protocol_steps"])
        for row in shown
        if "prototype" in row["commit"]
    }
    assert prototypes == PROTOTYPES
    seeds = {}
    for protocol, row in shown_runs():
        seeds.setdefault((protocol[0], protocol[-1], row["method"]), set()).add(row["seed"])
    several = {key: found for key, found in seeds.items() if found != {0}}
    assert all(found == {0, 1} for found in several.values())
    names = {
        context: ", ".join(sorted(m for c, equal, m in several if c == context))
        for context in (16384, 32768)
    }
    assert names == {
        16384: "dense, spans-0.5, tail-0.5",
        32768: "computed8-0.5, dense, tail-0.5",
    }


# Names that settings had when some of the rows were measured, and have now.
RENAMED = {"schedule": "keep_schedule", "loss_segment": "loss_chunk"}


def current_elimination(recorded):
    """The elimination of a row in the names and groups of today's `LemoConfig`.

    Until 2026-11-28 all fields were in one group, and the scorer "exact" was called "label".
    """
    values = {RENAMED.get(name, name): value for name, value in recorded.items()}
    names = {*LayerwiseConfig.model_fields} - {"keep"}
    layerwise = dict(values.pop("layerwise", {}))
    layerwise |= {name: values.pop(name) for name in names & {*values}}
    if isinstance(values.get("keep"), list):
        layerwise["keep"] = values.pop("keep")
    if values.get("scorer") == "label":
        values["scorer"] = "exact"
    return values | ({"layerwise": layerwise} if layerwise else {})


def groups_of(elimination):
    return current_elimination(elimination).get("layerwise", {}).get("group_size")


def what_counts(elimination, defaults):
    """Of the settings of an elimination, as one value."""
    if not elimination or elimination.get("keep") == 1:
        return elimination and groups_of(elimination)
    # They train on text.
    return LemoConfig(**current_elimination(defaults | elimination)).resolved(answers=False)


def test_every_shown_run_has_the_settings_of_its_method():
    for protocol, row in shown_runs():
        context, steps, batch, rate = protocol[:4]
        first_round = rate == 1e-3
        # The caption says what "drop4096" is.
        name = {"drop4096": "long-spans-0.5"}.get(row["method"], row["method"])
        method = in_numbers(METHODS[name], {"context": context, "batch": batch})
        ran = row["settings"]
        place = (row["method"], protocol)
        defaults = FIRST_ROUND if first_round else {}
        expected = what_counts(method.get("elimination"), {})
        assert what_counts(ran.get("elimination"), defaults) == expected, place
        # Two exceptions stand in the caption.
        prototype = (name, context, steps) in PROTOTYPES
        if not prototype and (name, first_round) != ("dense", True):
            assert ran.get("settings", {}) == method.get("settings", {}), place


def test_a_changed_figure_is_noticed(monkeypatch):
    (row,) = runs("even16-0.3")
    changed = json.loads(json.dumps(row))
    changed["perplexity"]["tex"] *= 1.01
    others = [other for other in ROWS if other is not row]
    monkeypatch.setitem(globals(), "ROWS", [*others, changed])
    assert any(sentence not in PAGE for sentence in sentences())
