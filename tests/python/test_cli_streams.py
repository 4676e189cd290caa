"""Closed, full and small-lettered standard streams, and names that hold anything."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from lemo.cli import main as module
from lemo.cli import options
from lemo.cli.eval import _table
from lemo.cli.main import main
from lemo.cli.streams import TolerantStream, printable
from tiny import save_tiny_llama, write_documents

# The command line.
pytestmark = pytest.mark.cpu_only

NAME = "[/red]:smile:\x1b[31m"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_llama(folder / "model")
    write_documents(folder / "d.jsonl")
    return folder


def shell(line: str, folder: Path) -> subprocess.CompletedProcess:
    """Run a line of bash, in which $lemo is the command, in ``folder``."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "lemo": f"{sys.executable} -m lemo",
    }
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True
    )


TRAIN = (
    "$lemo finetune --model model --documents d.jsonl --context-length 96 --lora-rank 4 "
    "--dense --steps 3 --set warmup_steps=0 --output "
)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("pipe", TRAIN + "pipe 2>&1 | head -1; exit ${PIPESTATUS[0]}"),
        ("full", TRAIN + "full >/dev/full 2>&1"),
        ("closed", TRAIN + "closed <&- >&- 2>&-"),
    ],
)
def test_a_training_goes_on_without_its_screen(inputs, name, line):
    outcome = shell(line, inputs)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    run = inputs / name
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    # Nothing that was meant for a closed stream is in a file of the run.
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").open()] == [1, 2, 3]


def test_results_that_cannot_be_printed_are_a_failure_at_the_end(inputs):
    outcome = shell(
        "$lemo eval --model model --documents d.jsonl --lengths 64 --json r.json > /dev/full",
        inputs,
    )
    assert outcome.returncode == 1
    # Other packages may say something when they are imported.
    assert outcome.stderr.endswith(
        "lemo: error: standard output: No space left on device; not all results were printed\n"
    )
    assert len(json.loads((inputs / "r.json").read_text())) == 2


class Full(io.StringIO):
    def write(self, text):
        raise OSError(28, "No space left on device")


def test_what_happened_to_standard_error_is_said_where_it_can_be(monkeypatch, capsys):
    monkeypatch.setattr(module, "_run", lambda arguments: print("progress", file=sys.stderr) or 0)
    monkeypatch.setattr(sys, "stderr", Full())
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with pytest.raises(SystemExit) as exit_:
        main(["report"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == (
        "lemo: warning: standard error: No space left on device; some messages are lost\n"
    )


def test_letters_that_a_stream_does_not_have_are_escaped():
    raw = io.BytesIO()
    stream = TolerantStream(io.TextIOWrapper(raw, encoding="ascii"))
    console = Console(file=stream)
    row = {"kind": "ü\udcff", "length": 4, "documents": 1}
    console.print(_table([row | {"perplexity": 1.5, "tail_perplexity": 2.5}]))
    stream.flush()
    text = raw.getvalue().decode()
    assert "| \\xfc\\udcff |" in text
    assert stream.error is None


def test_names_are_printed_as_they_are(capsys):
    assert printable("a\x1b[31mb\x00\u202e\udcff ü\n") == "a\\x1b[31mb\\x00\\u202e\\udcff ü\n"
    row = {"kind": NAME, "length": 4, "documents": 1, "perplexity": 1.5, "tail_perplexity": 2.5}
    options.result_console().print(_table([row]))
    assert "[/red]:smile:\\x1b[31m" in capsys.readouterr().out


def test_a_long_name_does_not_cut_figures(capsys):
    row = {"kind": "k" * 500, "length": 123456, "documents": 123}
    options.result_console().print(
        _table([row | {"perplexity": 123456.789, "tail_perplexity": 234567.891}])
    )
    out = capsys.readouterr().out
    assert "123456.789" in out
    assert "234567.891" in out
    assert out.count("k") >= 500


def test_a_run_with_brackets_in_its_name(inputs, monkeypatch, capsys):
    monkeypatch.chdir(inputs)
    line = [*TRAIN.replace("$lemo ", "").split(), "a[/red]$x_{"]
    for arguments in (line, ["report", "a[/red]$x_{", "--output", "r[/y]"]):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert not exit_.value.code, capsys.readouterr().err
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1] == "adapter: a[/red]$x_{/adapter"
    assert captured.out == "Report: r[/y]/index.html\n"


def test_a_stream_that_was_closed_is_no_terminal():
    file = io.StringIO()
    file.close()
    stream = TolerantStream(file)
    assert not stream.isatty()
    Console(file=stream).print("lost")
    assert isinstance(stream.error, ValueError)
