"""Settings on the command line, and the lines that progress prints."""

import re
from pathlib import Path
from typing import Literal

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from lemo.cli import options
from lemo.cli.finetune import completed
from lemo.cli.from_settings import Given, with_settings
from lemo.cli.options import apply_assignments, check_choice, parse_integers
from lemo.cli.progress import StepProgress, describe, duration
from lemo.settings.finetune import FinetuneConfig
from lemo.settings.preparation import PrepareConfig

# The command line.
pytestmark = pytest.mark.cpu_only


def test_assignments_take_yaml_values_and_dots():
    settings = {"steps": 3, "elimination": {"keep": 0.5}}
    apply_assignments(
        settings, ["steps=9", "elimination.keep=[0.5, 1]", "lora_targets=null", "seed = 4"]
    )
    assert settings == {
        "steps": 9,
        "elimination": {"keep": [0.5, 1]},
        "lora_targets": None,
        "seed": 4,
    }


@pytest.mark.parametrize(
    "assignment",
    [
        "steps",
        "=3",
        "a..b=3",
        "a=[1",
        "a=2026-13-45",
        "a={b: 1, b: 2}",
        "a=0x" + "f" * 5000,
        "a=" + "[" * 10_000,
    ],
)
def test_assignments_that_are_none(assignment):
    with pytest.raises(ValueError, match="--set: expected"):
        apply_assignments({}, [assignment])


def test_assignment_into_a_value():
    with pytest.raises(ValueError, match="'steps' is 3, it has no 'keep'"):
        apply_assignments({"steps": 3}, ["steps.keep=1"])


def test_command_line_over_file_over_defaults(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "steps: 1\nseed: 1\nelimination: {keep: 0.25, block_size: 8}\n"
    )
    given = Given(tmp_path / "c.yaml", {"steps": 2}, ["elimination.keep=0.75"])
    settings = completed(given, dense=False).collected()
    assert settings == {"steps": 2, "seed": 1, "elimination": {"keep": 0.75, "block_size": 8}}


def test_set_over_options_over_file(tmp_path):
    (tmp_path / "c.yaml").write_text("steps: 1\nseed: 1\nwindows: 1\nelimination: null\n")
    given = {"steps": 2, "seed": 2, "elimination.keep": 0.25, "elimination.predictor": "a: b"}
    settings = options.collect_settings(
        tmp_path / "c.yaml", given, ["seed=3", "elimination.keep=0.5"]
    )
    assert settings == {
        "steps": 2,
        "seed": 3,
        "windows": 1,
        "elimination": {"keep": 0.5, "predictor": "a: b"},
    }
    with pytest.raises(ValueError, match="elimination.keep: 'elimination' is 3, it has no 'keep'"):
        options.collect_settings(None, {"elimination": 3, "elimination.keep": 0.5}, [])


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ('{"format": "lemo-heads", "seed": 1}', "unknown setting 'format'"),
        ('{"steps": "many"}', "steps: expected an integer"),
        ('{"elimination": {"keep": 2}}', r"elimination\.keep: expected a number in \[0, 1\]"),
    ],
)
def test_a_fault_of_the_file_names_the_file(tmp_path, content, fault):
    config = tmp_path / "c.json"
    config.write_text(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(config))}: {fault}"):
        Given(config, {"output": "o"}, []).settings(FinetuneConfig)


def test_a_fault_of_an_option_names_no_file(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("model: m\nsteps: many\n")
    needed = {"documents": "d", "output": "o"}
    given = Given(config, needed | {"steps": 2}, ["rank=x"])
    with pytest.raises(ValueError, match="^rank: expected"):
        given.settings(PrepareConfig)
    with pytest.raises(ValueError, match="^documents: expected a value, got none"):
        Given(config, {"output": "o", "steps": 2}, []).settings(PrepareConfig)
    assert Given(config, needed | {"steps": 2}, []).settings(PrepareConfig).steps == 2


def test_dense_turns_elimination_off(tmp_path):
    (tmp_path / "c.yaml").write_text("elimination: {keep: 0.25}\n")
    given = Given(tmp_path / "c.yaml", {}, [])
    assert completed(given, dense=True).collected() == {"elimination": None}
    with pytest.raises(ValueError, match="--dense: expected no setting of elimination"):
        completed(Given(None, {}, ["elimination.keep=1"]), dense=True)
    with pytest.raises(ValueError, match="beside it, got 'elimination.predictor'"):
        completed(Given(None, {"elimination.predictor": "p"}, []), dense=True)


def test_integers():
    assert parse_integers("64, 4096,8K,1k,-1,2M", "--lengths") == [
        *(64, 4096, 8192, 1024, -1, 2097152),
    ]
    for text in ("", "4,", "1.5", "k", "4G", "4KM"):
        with pytest.raises(ValueError, match="--lengths: expected integers with commas"):
            parse_integers(text, "--lengths")


def test_choices():
    kind = Literal["auto", "float32"]
    check_choice("--dtype", "auto", kind)
    with pytest.raises(ValueError, match="--dtype: expected one of auto, float32, got 'int8'"):
        check_choice("--dtype", "int8", kind)


def test_options_are_those_of_the_settings():
    seen = []

    @with_settings(PrepareConfig, ["model", "lengths", "keep", "overwrite"], "x=1")
    def command(given: Given, twice: bool = False) -> None:
        """Says something."""
        seen.append((given, twice))

    app = typer.Typer(rich_markup_mode=None)
    app.command()(command)
    run = CliRunner().invoke
    arguments = ["--model", "m", "--lengths", "4K,-3", "--overwrite", "--set", "a=1", "--twice"]
    assert run(app, arguments).exit_code == 0
    options = {"model": "m", "lengths": [4096, -3], "overwrite": True}
    assert seen == [(Given(None, options, ["a=1"]), True)]
    text = " ".join(run(app, ["--help"]).output.split())
    assert PrepareConfig.model_fields["keep"].description.rstrip(".") in text
    assert "[default: 0.5]" in text
    assert "--seed" not in text
    assert run(app, ["--keep", "half"]).exit_code == 2


def test_output_files(tmp_path):
    options.check_output_file("--json", tmp_path / "new.json")
    options.check_output_file("--json", Path("new.json"))
    with pytest.raises(FileNotFoundError, match="^--json: .*'.*/no' is none"):
        options.check_output_file("--json", tmp_path / "no" / "new.json")
    with pytest.raises(IsADirectoryError, match="--json: expected a file"):
        options.check_output_file("--json", tmp_path)


def record(step: int) -> dict:
    return {
        "step": step,
        "steps": 4,
        "loss": 1.5,
        "tokens_per_second": 12345.6,
        "peak_memory_bytes": 3 * 2**29,
        "kept_share": 0.5,
        "seconds_left": 3725.0,
    }


def test_durations():
    assert [duration(s) for s in (0.4, 59.6, 61, 3725)] == ["0:00", "1:00", "1:01", "1:02:05"]


def test_a_line_says_everything():
    line = "loss 1.5000  12,346 tokens/s  1.50 GiB  kept 50%  1:02:05 left"
    assert describe(record(1)) == line


def test_plain_lines_where_there_is_no_terminal(capsys):
    with StepProgress(Console(width=100), every=3) as progress:
        for step in range(1, 5):
            progress(record(step))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"step {step}/4  {describe(record(step))}" for step in (3, 4)]


def test_one_live_line_on_a_terminal(capsys):
    with StepProgress(Console(width=140, force_terminal=True, color_system=None)) as progress:
        for step in range(1, 5):
            progress(record(step))
    out = capsys.readouterr().out
    assert "4/4" in out
    assert describe(record(4)) in out
