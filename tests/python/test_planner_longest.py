"""The longest window, and what would fit, as `lemo plan` says them: taken at their word."""

import re

import pytest
from transformers import LlamaConfig

from lemo.cli.main import main
from lemo.planner.text import needed_text

pytestmark = [pytest.mark.cpu_only, pytest.mark.usefixtures("script_defaults")]

HIDDEN, LAYERS = 512, 8


@pytest.fixture
def folder(tmp_path):
    LlamaConfig(
        vocab_size=4096,
        hidden_size=HIDDEN,
        intermediate_size=1408,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
    ).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def plan(folder, capsys):
    """Runs `lemo plan` with options: (exit code, standard output, standard error)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["plan", str(folder), "--dtype", "bfloat16", *map(str, arguments)])
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return run


def longest_of(out):
    return int(re.search(r"longest window that fits: (\d+) tokens", out)[1])


@pytest.mark.parametrize(
    "options",
    [
        ("--recompute", "none"),
        ("--recompute", "none,layer" + ",none" * (LAYERS - 2)),
        ("--set", "gradient_checkpointing=true"),
        ("--host-memory", "1GiB", "--set", "elimination.offload=0.5", "--recompute", "none"),
        ("--keep", "0.0625", "--set", "elimination={scorer: attention, heads: x, keep: 0.0625}"),
        ("--batch-size", "3"),
    ],
    ids=str,
)
def test_the_longest_window_fits_as_it_is_asked_for(options, plan):
    code, out, _ = plan("--tokens", "1K", "--gpu-memory", "2GiB", *options)
    longest = longest_of(out)
    assert code == 0
    code, out, _ = plan("--tokens", longest, "--gpu-memory", "2GiB", *options)
    assert code == 0
    peak, limit = re.search(r"peak memory: ([\d.]+) GiB of ([\d.]+) GiB", out).groups()
    assert float(peak) <= float(limit)
    code, _, error = plan("--tokens", longest + 2048, "--gpu-memory", "2GiB", *options)
    assert code == 1
    assert "what would fit" in error or "host_memory: expected" in error


def test_scores_of_the_residual_need_all_tokens_embedded(plan):
    """Twice: the embedded tokens, and their copy that layers change."""
    options = ("--keep", "0.01", "--set", "elimination.scorer=attention")
    options += ("--set", "elimination.heads=x", "--gpu-memory", "2GiB")
    most = 2**31 // (2 * 2 * HIDDEN)
    _, out, _ = plan("--tokens", "1K", *options)
    assert 0.8 * most < longest_of(out) < most
    code, _, error = plan("--tokens", most, *options)
    assert code == 1
    needed = float(re.search(r"--gpu-memory: expected ([\d.]+) GiB or more, got", error)[1])
    assert 2.0 < needed < 2.6


def test_a_step_has_no_more_tokens_than_the_operators_count(plan):
    for batch in (1, 64):
        options = ("--keep", "0.001", "--set", "elimination.block_size=64", "--batch-size", batch)
        _, out, _ = plan("--tokens", "4K", "--gpu-memory", "4000TiB", *options)
        assert longest_of(out) == (2**31 - 1) // batch // 16 * 16


@pytest.mark.parametrize("memory", ["0.7GiB", "99MiB"])
@pytest.mark.parametrize("recompute", ["auto", "none"])
def test_each_of_the_ways_that_would_fit_fits(memory, recompute, plan):
    given = {"--tokens": "32K", "--batch-size": 3, "--recompute": recompute}
    given["--gpu-memory"] = memory

    def succeeds(*more, **options):
        options = given | {f"--{name.replace('_', '-')}": text for name, text in options.items()}
        code, *_ = plan(*(part for pair in options.items() for part in pair), *more)
        return code == 0

    assert not succeeds()
    _, _, error = plan(*(part for pair in given.items() for part in pair))
    ways = error.partition("what would fit: ")[2].strip()
    found = dict.fromkeys(ways.split("; "), False)
    for way in found:
        number = re.search(r"[\d.]+", way)
        if way.endswith(" of memory"):
            found[way] = succeeds(gpu_memory=way.removesuffix(" of memory").replace(" ", ""))
        elif way == "recompute auto":
            found[way] = succeeds(recompute="auto")
        elif way.startswith("at most"):
            found[way] = succeeds(tokens=number[0])
        elif way.startswith("keep"):
            found[way] = succeeds("--set", "elimination.block_size=64", keep=number[0])
        elif "host_memory" in way:
            found[way] = succeeds(host_memory=number[0] + "GiB")
        elif "batch size 1" in way:
            found[way] = succeeds(batch_size=1)
        elif "nf4" in way:
            found[way] = succeeds(quantize="nf4")
    assert found
    assert all(found.values()), found


def test_what_is_said_to_be_needed_is_enough_and_little_more(plan):
    for tokens in ("24K", "25K", "30K", "34K", "40K"):
        options = "--tokens", tokens, "--batch-size", 3
        _, _, error = plan(*options, "--gpu-memory", "0.3GiB")
        needed = re.search(r"--gpu-memory: expected ([\d.]+) GiB or more, got", error)[1]
        assert f"what would fit: {needed} GiB of memory" in error
        assert plan(*options, "--gpu-memory", f"{needed}GiB")[0] == 0
        assert plan(*options, "--gpu-memory", f"{0.98 * float(needed):.4f}GiB")[0] == 1


def test_what_goes_to_the_host_anyway_has_to_find_place_there(plan):
    options = "--tokens", "32K", "--gpu-memory", "2GiB", "--set", "elimination.offload=1"
    for more in ((), ("--gpus", 2), ("--recompute", "layer")):
        code, _, error = plan(*options, "--host-memory", "1MiB", *more)
        assert code == 1
        assert "elimination.host_memory: expected " in error
        assert " for offload 1.0, got 1 MiB" in error


def test_a_text_of_what_is_needed_is_no_less():
    units = {"bytes": 1, "MiB": 2**20, "GiB": 2**30}
    for size in (17, 2**20 // 10 + 1, 2**20 + 1, 99 * 2**20 + 1, 2**30 // 10 + 1, 2**30 + 1):
        for more in (size, 3 * size, 10 * 2**30 + size, 99 * 2**30 + size):
            number, unit = needed_text(more).split()
            said = float(number) * units[unit]
            assert said > 0.99999999 * more
            assert said < 1.02 * more + 2**24
