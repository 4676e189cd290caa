"""Folders and files as people write them: relative, with "~" for the home folder, misspelt."""

import shutil

import pytest

from lemo.cli.main import main
from lemo.settings.finetune import FinetuneConfig
from lemo.settings.preparation import PrepareConfig
from lemo.settings.relevance import ScoresConfig
from lemo.training import finetune as training
from tiny import save_tiny_llama, write_documents

pytestmark = pytest.mark.cpu_only

TRAIN = ("--context-length", "64", "--steps", "1", "--set", "warmup_steps=0", "--device", "cpu")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder, with a model and documents; the working folder is another one."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    save_tiny_llama(home / "model")
    write_documents(home / "documents.jsonl")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    return home


def run(*arguments):
    """The exit code of the command line."""
    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    return ended.value.code


def test_an_adapter_of_a_relative_model_can_be_used_from_another_folder(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    data = "--documents", "documents.jsonl"
    assert run("finetune", "--model", "model", *data, "--output", "run", *TRAIN) == 0
    given = "--model", "model", "--adapter", "run/adapter", *data, "--lengths", "32"
    assert run("eval", *given) == 0
    assert "is put into" not in capsys.readouterr().err
    monkeypatch.chdir(home.parent / "here")
    capsys.readouterr()
    data = "--documents", str(home / "documents.jsonl"), "--lengths", "32"
    assert run("eval", "--adapter", str(home / "run" / "adapter"), *data) == 0
    # In a folder that is called as the model of the run is, lies another one.
    save_tiny_llama(home.parent / "here" / "model", layers=3)
    assert run("eval", "--adapter", str(home / "run"), *data) == 0
    assert run("eval", "--adapter", str(home / "run" / "adapter"), *data) == 0
    assert "is put into" not in capsys.readouterr().err


def test_the_home_folder_in_a_file_and_in_options(home, capsys):
    (home / "run.yaml").write_text(
        "model: ~/model\ndocuments: ~/documents.jsonl\noutput: ~/runs/a\n", encoding="utf-8"
    )
    assert run("finetune", "--config=~/run.yaml", *TRAIN) == 0
    assert run("finetune", "--config=~/run.yaml", "--output=~/runs/b", *TRAIN) == 0
    assert run("report", "~/runs/a", "--output=~/report") == 0
    assert run("eval", "--adapter=~/runs/a", "--documents=~/documents.jsonl", "--lengths=32") == 0
    for name in ("runs/a/adapter", "runs/b/adapter", "report/index.html"):
        assert (home / name).exists()
    assert not list((home.parent / "here").iterdir())
    # A folder of that name is reached as shells reach it.
    shutil.copytree(home / "model", home.parent / "here" / "~")
    assert run("plan", "./~", "--tokens", "1K", "--gpu-memory", "8GiB") == 0


def test_settings_that_are_places(home):
    of_run = {"model": "~/m", "documents": "~/d", "output": "~/o"}
    scored = {"elimination": {"scorer": "given", "scores": "~/s"}}
    assert FinetuneConfig.from_dict(of_run | scored).elimination.scores == f"{home}/s"
    for kind in (FinetuneConfig, PrepareConfig, ScoresConfig):
        settings = kind.from_dict(of_run)
        assert (settings.model, settings.documents) == (f"{home}/m", f"{home}/d")
        assert settings.output == f"{home}/o"
    assert FinetuneConfig.from_dict(of_run | {"model": "owner/a~b"}).model == "owner/a~b"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--heads", "heads: absent: expected a file, found none"),
        ("--predictor", "predictor: expected a folder written by 'lemo prepare', but absent"),
        ("--scores", "scores: expected a folder of `lemo relevance scores`, but absent"),
    ],
)
def test_what_a_scorer_reads_is_looked_for_before_documents_are_read(
    option, message, home, capsys, monkeypatch
):
    monkeypatch.setattr(training, "open_training_data", lambda *_: pytest.fail("documents read"))
    data = "--model", str(home / "model"), "--documents", str(home / "documents.jsonl")
    assert run("finetune", *data, "--output", "run", *TRAIN, option, "absent") == 1
    assert message in capsys.readouterr().err
