"""Stored scores: written once, read in every epoch, gone on with after a kill, and refused."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lemo.data import ExampleWindows
from lemo.data.chat import Encoded
from lemo.relevance import store
from lemo.relevance.store import ScoreStore, write_scores
from limits import largest_file
from score_samples import Sample, mean_ids, samples
from source_tree import ROOT

pytestmark = [pytest.mark.cpu_only, pytest.mark.usefixtures("script_defaults")]


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def small_files(monkeypatch):
    monkeypatch.setattr(store, "_FILE_TOKENS", 100)


@pytest.mark.usefixtures("small_files")
def test_scores_are_read_as_they_were_written(tmp_path):
    examples = samples()
    reports = []
    write_scores(
        tmp_path / "s",
        examples,
        lambda each: None if each is examples[3] else mean_ids(each),
        block_size=16,
        about={"scorer": "mine"},
        report=lambda *numbers: reports.append(numbers),
    )
    assert reports == [(done, 7) for done in range(1, 8)]
    assert len(content(tmp_path / "s")) > 3
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    read = ScoreStore.read(tmp_path / "s")
    assert (read.block_size, read.about) == (16, {"scorer": "mine"})
    read.check(examples)
    for example in examples:
        expected = None if example is examples[3] else mean_ids(example)
        assert read.of(example) is expected or torch.equal(read.of(example), expected)
    other = Sample(examples[0].ids, [-100, *examples[0].ids[1:]], "relabelled")
    with pytest.raises(ValueError, match=r"none of 1 of 2, such as relabelled; .* the data or the"):
        read.check([examples[0], other])
    with pytest.raises(KeyError):
        read.of(other)


def test_scores_of_tokens(tmp_path):
    [example] = samples(1)
    write_scores(tmp_path / "s", [example], lambda each: [float(i) for i in each.ids], block_size=1)
    read = ScoreStore.read(tmp_path / "s")
    assert read.of(example).tolist() == example.ids


def test_scores_that_are_drawn_follow_the_seed(tmp_path):
    """In windows of an example that has none, of which there is one in every epoch."""
    [example] = samples(1)
    write_scores(tmp_path / "s", [example], lambda each: None, block_size=16)
    read = ScoreStore.read(tmp_path / "s")
    drawn = [
        ExampleWindows([Encoded(example.ids, example.labels, "x")], 100, seed, read)
        .window(index)
        .scores
        for seed, index in ((1, 0), (1, 0), (1, 1), (2, 0))
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[3])


def test_the_digest_is_of_the_scores_alone(tmp_path):
    examples = samples()

    def digest(name, examples, factor=1.0, **more):
        write_scores(
            tmp_path / name, examples, lambda e: factor * mean_ids(e), block_size=16, **more
        )
        return ScoreStore.read(tmp_path / name).digest

    first = digest("a", examples)
    assert digest("b", examples[::-1], about={"scorer": "another"}) == first
    assert digest("c", examples, factor=2.0) != first
    assert digest("d", examples[1:]) != first

    def alike(name, ids, block_size):
        """One block with the same score."""
        write_scores(
            tmp_path / name, [Sample(ids, ids, name)], lambda _: [1.0], block_size=block_size
        )
        return ScoreStore.read(tmp_path / name).digest

    first = alike("e", [1, 2, 3], 16)
    assert alike("f", [1, 2, 3], 16) == first
    assert alike("g", [1, 2, 3], 32) != first
    assert alike("h", [1, 2, 4], 16) != first


@pytest.mark.usefixtures("small_files")
def test_examples_of_a_file_have_so_many_tokens_at_most(tmp_path):
    """But for one that is longer by itself."""
    lengths = [250, 40, 60, 1, 99, 100, 30, 30, 30, 30]
    examples = [Sample([5] * length, [5] * length, f"{length}") for length in lengths]
    write_scores(tmp_path / "s", examples, lambda _: None, block_size=16)
    assert json.loads((tmp_path / "s" / "scores.json").read_text())["files"] == [1, 2, 2, 1, 3, 1]


def test_scores_may_come_from_a_trained_model(tmp_path):
    [example] = samples(1)
    weights = torch.ones(3, requires_grad=True)
    blocks = -(-len(example.ids) // 16)
    write_scores(
        tmp_path / "s", [example], lambda _: 2 * weights.mean().expand(blocks), block_size=16
    )
    assert ScoreStore.read(tmp_path / "s").of(example).tolist() == [2.0] * blocks


@pytest.mark.usefixtures("small_files")
def test_an_interrupted_computation_goes_on_where_it_stopped(tmp_path):
    examples, scored = samples(), []

    def score(example):
        if len(scored) == 4:
            raise KeyboardInterrupt
        scored.append(example.name)
        return mean_ids(example)

    with pytest.raises(KeyboardInterrupt):
        write_scores(tmp_path / "s", examples, score, block_size=16)
    with pytest.raises(ValueError, match=r"lacks scores-0000\d\.safetensors of \d such files: its"):
        ScoreStore.read(tmp_path / "s")
    with pytest.raises(FileExistsError, match="--resume goes on with scores that are there"):
        write_scores(tmp_path / "s", examples, mean_ids, block_size=16)
    again, reports = [], []

    def rest(example):
        again.append(example.name)
        return mean_ids(example)

    def report(done, total):
        reports.append((done, len(again)))

    write_scores(tmp_path / "s", examples, rest, block_size=16, resume=True, report=report)
    assert 3 <= len(again) < 7
    # What is there is reported, too.
    assert (7 - len(again), 0) in reports
    assert reports[-1] == (7, len(again))
    assert again == [each.name for each in examples[-len(again) :]]
    write_scores(tmp_path / "whole", examples, mean_ids, block_size=16)
    assert content(tmp_path / "s") == content(tmp_path / "whole")


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from lemo.data import ExampleWindows
from lemo.data.chat import Encoded
from lemo.relevance import store
from score_samples import mean_ids, samples
store._FILE_TOKENS = 100
def score(example):
    if example.name == "data.jsonl:5":
        os.kill(os.getpid(), signal.SIGKILL)
    return mean_ids(example)
store.write_scores(sys.argv[1], samples(), score, block_size=16)
"""


@pytest.mark.usefixtures("small_files")
def test_a_killed_computation_goes_on(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT / "python")}
    command = [sys.executable, "-c", KILLED, tmp_path / "s", ROOT / "tests" / "python"]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = content(tmp_path / "s")
    assert "scores.json" in left
    assert len(left) > 1
    write_scores(tmp_path / "s", samples(), mean_ids, block_size=16, resume=True)
    write_scores(tmp_path / "whole", samples(), mean_ids, block_size=16)
    assert content(tmp_path / "s") == content(tmp_path / "whole")
    # The killed one's lock file went with the second.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s", "whole"]


def damage_the_end(file):
    file.write_bytes(file.read_bytes()[:-3])


def damage_a_number(file):
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)


def damage_the_counts(file):
    """Every other byte is as it was."""
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors["blocks"] -= 1
    save_file(tensors, file, metadata)


def empty(file):
    file.write_bytes(b"")


def take_anothers(file):
    file.write_bytes((file.parents[1] / "other" / file.name).read_bytes())


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize(
    "change", [damage_the_end, damage_a_number, damage_the_counts, empty, take_anothers]
)
def test_a_damaged_file_is_named_and_computed_again(tmp_path, change):
    examples = samples()
    write_scores(tmp_path / "s", examples, mean_ids, block_size=16)
    write_scores(tmp_path / "other", examples, mean_ids, block_size=16, about={"scorer": "b"})
    whole = content(tmp_path / "s")
    change(tmp_path / "s" / "scores-00001.safetensors")
    with pytest.raises(ValueError, match=r"scores-00001\.safetensors is damaged or of another"):
        ScoreStore.read(tmp_path / "s")
    scored = []

    def score(example):
        scored.append(example.name)
        return mean_ids(example)

    write_scores(tmp_path / "s", examples, score, block_size=16, resume=True)
    assert 1 <= len(scored) <= 3
    assert content(tmp_path / "s") == whole


def description(**changes):
    known = {"block_size": 16, "files": [7], "data": "", "about": {}}
    return json.dumps({"format": "lemo-scores", "version": 1} | known | changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON, got "),
        ("{}", "was not written by `lemo relevance scores`"),
        ('{"format": "lemo-scores", "version": 9}', "expected version 1, got 9"),
        ('{"format": "lemo-scores", "version": 1, "block_size": "a"}', "'block_size': expected"),
        (description(block_size=True), "field 'block_size': expected int, got True"),
        (description(block_size=0), "expected a block_size and files of 1 or more"),
        (description(files=[1, 0]), "expected a block_size and files of 1 or more"),
        (description(files=[1, "2"]), "expected a block_size and files of 1 or more"),
    ],
)
def test_a_damaged_description_is_named(tmp_path, text, message):
    write_scores(tmp_path / "s", samples(), mean_ids, block_size=16)
    (tmp_path / "s" / "scores.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        ScoreStore.read(tmp_path / "s")


def test_other_settings_are_not_gone_on_with(tmp_path, monkeypatch):
    examples = samples()
    about = {"scorer": "lexical", "context_length": 90, "tokenizer": "0" * 64}
    write_scores(tmp_path / "s", examples, mean_ids, block_size=16, about=about)
    before = content(tmp_path / "s")

    def resume(message, examples=examples, block_size=16, **changes):
        with pytest.raises(ValueError, match=f"^resume: .*other settings: {message}$"):
            write_scores(
                tmp_path / "s",
                examples,
                mean_ids,
                block_size=block_size,
                about=about | changes,
                resume=True,
            )

    resume("block_size was 16, now 32", block_size=32)
    resume("heads was None, now 'h'; scorer was 'lexical', now 'attention'", scorer="attention",
           heads="h")  # fmt: skip
    resume("tokenizer is another one", tokenizer="1" * 64)
    # A digest says nothing to a reader, a name of as many characters does.
    resume(f"heads was None, now '{'h' * 64}'", heads="h" * 64)
    resume("the examples are others now", examples=examples[:-1])
    resume("the examples are others now", examples=examples[::-1])
    resume("context_length was 90, now 60", examples=examples[:-1], context_length=60)
    with monkeypatch.context() as patch:
        patch.setattr(store, "_FILE_TOKENS", 1)
        resume("the examples are others now")
    assert content(tmp_path / "s") == before


def test_what_is_in_the_way_stays(tmp_path):
    examples = samples()
    arguments = {"examples": examples, "score": mean_ids, "block_size": 16}
    with pytest.raises(FileNotFoundError, match="there are no scores in .* to resume"):
        write_scores(tmp_path / "s", **arguments, resume=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="expected a folder, but .* is a file"):
        write_scores(tmp_path / "file", **arguments)
    write_scores(tmp_path / "s", **arguments)
    (tmp_path / "s" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"did not write .*mine\.txt"):
        write_scores(tmp_path / "s", **arguments, overwrite=True)
    (tmp_path / "s" / "mine.txt").unlink()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "scores.json").write_text('{"mine": 1}')
    with pytest.raises(ValueError, match="was not written by `lemo relevance scores`"):
        write_scores(tmp_path / "other", **arguments, overwrite=True)
    assert (tmp_path / "other" / "scores.json").read_text() == '{"mine": 1}'
    before = content(tmp_path / "s")

    def fail(example):
        raise FloatingPointError

    with pytest.raises(FloatingPointError):
        write_scores(tmp_path / "s", examples, fail, block_size=16, overwrite=True)
    assert content(tmp_path / "s") == before
    write_scores(tmp_path / "s", examples[:2], mean_ids, block_size=16, overwrite=True)
    assert json.loads((tmp_path / "s" / "scores.json").read_text())["files"] == [2]


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda example: [1.0], r"expected one for each block, \[\d\], of data.jsonl:1, got \[1\]"),
        (lambda example: mean_ids(example) * math.nan, "finite numbers .* for data.jsonl:1, got n"),
        (lambda example: mean_ids(example) - math.inf, "finite numbers .* for data.jsonl:1, got -"),
        (lambda example: mean_ids(example).double() + 1e39, "for data.jsonl:1, got inf"),
    ],
)
def test_scores_that_do_not_fit_leave_nothing(tmp_path, score, message):
    with pytest.raises(ValueError, match=message):
        write_scores(tmp_path / "deep" / "s", samples(), score, block_size=16)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resume": True, "overwrite": True}, "at most one of the two"),
        ({"examples": []}, "examples: expected one or more"),
        ({"block_size": 0}, "block_size: expected 1 or more, got 0"),
        ({"about": {"rate": math.nan}}, "about: expected names and plain values, got "),
        ({"about": {"model": Path("m")}}, "about: expected names and plain values, got "),
    ],
)
def test_bad_arguments(tmp_path, changes, message):
    arguments = {"examples": samples(), "score": mean_ids, "block_size": 16} | changes
    with pytest.raises(ValueError, match=message):
        write_scores(tmp_path / "s", **arguments)


def test_two_processes_do_not_write_to_one_folder(tmp_path):
    def score(example):
        with pytest.raises(BlockingIOError, match=r"output: '.*/s' is in use by process"):
            write_scores(tmp_path / "s", samples(), mean_ids, block_size=16, overwrite=True)
        return mean_ids(example)

    write_scores(tmp_path / "s", samples(2), score, block_size=16)
    ScoreStore.read(tmp_path / "s").check(samples(2))


@pytest.mark.usefixtures("small_files")
def test_a_full_disk_leaves_whole_files(tmp_path):
    examples = [*samples(2), Sample([1] * 4000, [-100] * 3999 + [1], "long")]

    def scores_of_tokens(example):
        return [float(i) for i in example.ids]

    with pytest.raises(OSError), largest_file(8000):  # noqa: PT011
        write_scores(tmp_path / "s", examples, scores_of_tokens, block_size=1)
    write_scores(tmp_path / "s", examples, scores_of_tokens, block_size=1, resume=True)
    ScoreStore.read(tmp_path / "s").check(examples)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_stored_scores_that_are_not_finite_are_refused(tmp_path, monkeypatch, wrong):
    """As an earlier version wrote them, or somebody else's program."""
    folder = tmp_path / "s"
    with monkeypatch.context() as earlier:
        earlier.setattr(store, "_check_finite", lambda *_: None)
        write_scores(folder, samples(), lambda each: mean_ids(each) * wrong, block_size=16)
    with pytest.raises(ValueError, match=f"numbers in fp32 for .*/scores-00000.*, got {wrong}$"):
        ScoreStore.read(folder)
    write_scores(folder, samples(), mean_ids, block_size=16, resume=True)
    assert torch.equal(ScoreStore.read(folder).of(samples()[0]), mean_ids(samples()[0]))
