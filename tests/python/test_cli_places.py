"""Folders and files as people write them: relative, with "~" for the home folder, misspelt."""

import shutil

import pytest

from lemo.cli.main import main
from lemo.predictors.model import model_shape
from lemo.relevance.heads import RetrievalHeads
from lemo.settings.finetune import FinetuneConfig
from lemo.settings.preparation import PrepareConfig
from lemo.settings.relevance import ScoresConfig
from lemo.training import finetune as training
from lemo.training.model import load_config
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


def refused(home, capsys, line):
    """The message of a command line; {scored} and the like are what the command needs besides."""
    pairs, heads = home / "pairs.jsonl", home / "heads.json"
    pairs.write_text('{"prompt": "what? ", "completion": "that"}\n' * 2)
    RetrievalHeads(model_shape(load_config(str(home / "model"))), ((0, 0),)).save(heads)
    model = f"--model {home}/model --output out --device cpu"
    data = f"{model} --documents {home}/documents.jsonl"
    answers = f"{model} --documents {pairs} --heads {heads}"
    needed = {
        "scored": f"{answers} --scorer attention --context-length 64",
        "prepared": f"{data} --lengths 64 --block-size 16 --rank 8",
        "answers": f"{answers} --lengths 64",
        "trained": f"{data} {' '.join(TRAIN)}",
    }
    assert run(*line.format(home=home, **needed).split()) == 1
    assert not (home.parent / "here" / "out").exists()
    return capsys.readouterr().err.splitlines()[-1].removeprefix("lemo: error: ")


@pytest.mark.parametrize("kind", ["absent", "empty", "folder", "damaged"])
@pytest.mark.parametrize(
    ("line", "begin"),
    [
        ("relevance scores {scored} --scout bad", "scout: 'bad' "),
        ("relevance scores {scored} --scout {home}/model --model bad", "model: 'bad' "),
        ("relevance scores {scored} --heads bad/file", "heads: bad/file: "),
        ("prepare {prepared} --held-out-documents bad", "held_out_documents: expected .jsonl"),
        ("prepare {answers} --held-out-documents bad", "held_out_documents: expected .jsonl"),
        ("finetune {trained} --scores bad", "scores: expected a folder of `lemo relevance scores`"),
    ],
)
def test_an_error_names_the_argument_that_was_given(line, begin, kind, home, capsys):
    """Whatever lies at "bad": nothing, an empty file, an empty folder, a file that ends early."""
    bad = home.parent / "here" / "bad"
    if kind == "folder":
        bad.mkdir()
    elif kind != "absent":
        bad.write_text("" if kind == "empty" else '{"a": [1, ')
    assert refused(home, capsys, line).startswith(begin)


@pytest.mark.parametrize(
    ("line", "begin"),
    [
        ("relevance scores {scored} --scout config.json", "scout: 'config.json' cannot be read"),
        ("relevance scores {scored} --scout model.safetensors", "scout: the weights of 'model.saf"),
        ("relevance scores {scored} --scout tokenizer.json", "scout: 'tokenizer.json' has no tok"),
        ("prepare {prepared} --held-out-documents a.jsonl", "held_out_documents: expected at lea"),
        ("prepare {answers} --held-out-documents a.jsonl", "held_out_documents: expected at lea"),
        (
            "eval --adapter adapter --documents {home}/documents.jsonl --lengths 32",
            "adapter: the model that it names: 'gone' is neither a folder",
        ),
    ],
)
def test_so_does_one_about_what_lies_there(line, begin, home, capsys):
    """Models without a file, documents that are too short, an adapter whose model is not there."""
    here = home.parent / "here"
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copytree(home / "model", here / name)
        (here / name / name).write_text("")
    (here / "a.jsonl").write_text('{"text": "a"}')
    (here / "adapter").mkdir()
    (here / "adapter" / "adapter_model.safetensors").write_text("")
    (here / "adapter" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "gone"}'
    )
    assert refused(home, capsys, line).startswith(begin)


@pytest.mark.parametrize(
    "line",
    [
        "finetune {data} --context-length 64 --steps 1 --set warmup_steps=0",
        "prepare {data} --lengths 64 --block-size 16 --rank 8",
        "relevance scores {data}",
        "report run",
        "demo",
    ],
)
def test_an_output_behind_a_file_is_named(line, home, capsys):
    (home.parent / "here" / "file").write_text("mine")
    data = f"--model {home}/model --documents {home}/documents.jsonl"
    if line.startswith("relevance"):
        data = data.replace("documents.jsonl", "pairs.jsonl")
        (home / "pairs.jsonl").write_text('{"prompt": "what? ", "completion": "that"}\n' * 2)
    if line.startswith("report"):
        assert run("finetune", *data.split(), "--output", "run", *TRAIN) == 0
    assert run(*line.format(data=data).split(), "--output", "file/a/b") == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("lemo: error: output: '")
    assert "file/a/b': expected folders above it, but '" in message
    assert (home.parent / "here" / "file").read_text() == "mine"


@pytest.mark.parametrize("settings", ["", "model: m\ndocuments: d\noutput: o\n", "{model: [1, "])
def test_a_damaged_configuration_of_a_run_is_named(settings, home, capsys):
    data = "--model", str(home / "model"), "--documents", str(home / "documents.jsonl")
    assert run("finetune", *data, "--output", "run", *TRAIN) == 0
    (home.parent / "here" / "run" / "config.yaml").write_text(settings)
    for given in ((), (*data, *TRAIN, "--config", "own.yaml")):
        (home.parent / "here" / "own.yaml").write_text("seed: 0")
        capsys.readouterr()
        assert run("finetune", "--output", "run", "--resume", *given) == 1
        assert "lemo: error: run/config.yaml:" in capsys.readouterr().err.splitlines()[-1]
