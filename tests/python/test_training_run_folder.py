"""Run folders: one process at a time, what is lemo's to remove, moved and renamed ones."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lemo import LemoConfig
from lemo.cli.main import main
from lemo.predictors.model import embedding_digest
from lemo.preparation.documents import PrepareConfig, prepare_from_documents
from lemo.settings.finetune import FinetuneConfig
from lemo.training import checkpoint
from lemo.training import finetune as module
from lemo.training.checkpoint import newest_checkpoint
from lemo.training.finetune import finetune
from lemo.training.metrics import add_metrics
from lemo.training.run_folder import reading, writing
from lemo.training.run_log import read_log
from tiny import save_tiny_llama, write_documents

# Files alone.
pytestmark = [pytest.mark.cpu_only, pytest.mark.usefixtures("script_defaults")]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    with torch.device("cpu"):
        save_tiny_llama(folder / "model")
    write_documents(folder / "d.jsonl")
    return folder


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """The folder of a run of four steps with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    finetune(settings(inputs, folder))
    return folder


def settings(inputs, folder, **changes) -> FinetuneConfig:
    values = {"context_length": 96, "steps": 4, "save_every": 2, "warmup_steps": 1, "lora_rank": 4}
    return FinetuneConfig(
        model=str(inputs / "model"),
        documents=str(inputs / "d.jsonl"),
        output=str(folder),
        **values | {"elimination": LemoConfig(block_size=16)} | changes,
    )


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run, as if it had been stopped after its last checkpoint."""
    folder = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    shutil.rmtree(folder / "adapter")
    return folder


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_log(folder / "log.jsonl")]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def command(*arguments) -> None:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == 0


@pytest.mark.parametrize("change", [{"resume": True}, {"overwrite": True}, {}])
def test_a_folder_in_use_is_refused_by_every_path(inputs, run, change):
    (run.parent / "link").symlink_to(run)
    before = snapshot(run)
    with (
        writing(run),
        pytest.raises(BlockingIOError, match=f"in use by process {os.getpid()} on"),
    ):
        finetune(settings(inputs, run.parent / "link", **change))
    assert snapshot(run) == before


def test_a_new_folder_is_taken_before_the_model_is_loaded(inputs, tmp_path):
    folder = tmp_path / "new" / "run"
    with writing(folder), pytest.raises(BlockingIOError):
        finetune(settings(inputs, folder).replace(model="absent"))
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_was_killed_can_be_resumed_but_not_while_it_runs(inputs, run):
    script = """
        import sys, time
        from pathlib import Path
        from lemo.training.run_folder import writing
        with writing(Path(sys.argv[1])):
            print("ready", flush=True)
            time.sleep(600)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment()) as process:
        process.stdout.readline()
        with pytest.raises(BlockingIOError, match=f"in use by process {process.pid} on"):
            finetune(settings(inputs, run, resume=True))
        process.send_signal(signal.SIGKILL)
    finetune(settings(inputs, run, resume=True))
    assert (run / "adapter").is_dir()
    assert not (run / ".lock").exists()


def test_every_process_of_a_run_says_that_the_folder_is_in_use(inputs, run, tmp_path):
    script = """
        import sys
        from lemo.cli.main import main
        main(["finetune", "--output", sys.argv[1], "--resume"])
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with writing(run):
        outcome = subprocess.run(
            [*launch, str(tmp_path / "script.py"), str(run)],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert outcome.returncode == 1
    assert f"is in use by process {os.getpid()} on" in outcome.stderr


def test_an_adapter_does_not_change_while_it_is_evaluated(inputs, finished):
    with reading(finished) as writable, reading(finished):
        assert writable
        with pytest.raises(BlockingIOError):
            finetune(settings(inputs, finished, overwrite=True))


def test_two_preparations_of_one_folder(inputs, tmp_path):
    sizes = {"lengths": (64,), "windows": 4, "steps": 2, "search_rounds": 0, "block_size": 8}
    paths = {"model": str(inputs / "model"), "documents": str(inputs / "d.jsonl")}
    config = PrepareConfig(**paths, **sizes, output=str(tmp_path / "deep" / "predictor"))
    second = []

    def report(stage, done, total, message):
        if stage == "documents" and done == 0:
            with pytest.raises(BlockingIOError, match="predictor' is in use by process"):
                prepare_from_documents(config)
            second.append(True)

    prepare_from_documents(config, report)
    assert second == [True]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["predictor"]
    # A link stays one.
    (tmp_path / "link").symlink_to("deep/predictor")
    prepare_from_documents(config.replace(output=str(tmp_path / "link"), overwrite=True))
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["predictor"]


@pytest.mark.parametrize(
    ("stranger", "named"),
    [
        ("adapter/README.md", "'adapter/README.md'"),
        ("checkpoints/step-1/pytorch_model.bin", "'checkpoints/step-1/pytorch_model.bin'"),
        ("checkpoints/last.ckpt", "'checkpoints/last.ckpt'"),
        ("tensorboard/notes", "'tensorboard/notes'"),
    ],
)
def test_overwrite_removes_nothing_that_lemo_did_not_write(inputs, run, stranger, named):
    (run / stranger).parent.mkdir(exist_ok=True)
    (run / stranger).write_text("mine")
    before = snapshot(run)
    with pytest.raises(FileExistsError, match=f"overwrite: lemo did not write {named} in"):
        finetune(settings(inputs, run, overwrite=True))
    assert snapshot(run) == before
    (run / stranger).unlink()
    # Of the demo: what it says is not of the run that comes.
    (run / "relevance.json").write_text("{}")
    finetune(settings(inputs, run, overwrite=True, steps=1))
    assert len(losses(run)) == 1
    assert not (run / "relevance.json").exists()


@pytest.mark.parametrize("name", ["adapter", "checkpoints", "checkpoints/step-4", "tensorboard"])
def test_overwrite_removes_nothing_where_a_part_would_stay(inputs, run, monkeypatch, name):
    """Root may remove everything, so that the system's answer is given here."""
    allowed, locked = os.access, run / name
    locked.mkdir(exist_ok=True)
    monkeypatch.setattr(os, "access", lambda path, mode: path != locked and allowed(path, mode))
    before = snapshot(run)
    with pytest.raises(PermissionError, match=f"overwrite: '{run / name}' cannot be changed"):
        finetune(settings(inputs, run, overwrite=True))
    assert snapshot(run) == before


def test_results_are_shown_where_no_file_takes_them(inputs, finished, monkeypatch, capsys):
    def full(path, rows):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("lemo.training.metrics.add_metrics", full)
    given = ["--documents", inputs / "d.jsonl", "--lengths", "64", "--device", "cpu"]
    with pytest.raises(SystemExit) as end:
        main([str(each) for each in ["eval", "--adapter", finished, *given]])
    shown = capsys.readouterr()
    assert end.value.code == 1
    assert "last quarter" in shown.out
    assert f"No space left on device: {finished / 'metrics.json'}" in shown.err


def test_overwrite_leaves_nothing_that_tells_of_the_earlier_run(inputs, finished, tmp_path):
    """What is there afterwards is what a run leaves in a new folder."""
    folder, new = shutil.copytree(finished, tmp_path / "run"), tmp_path / "new"
    add_metrics(folder / "metrics.json", [{"kind": "text", "length": 64}])
    command("report", folder)
    assert (folder / "report" / "kept_map.png").exists()
    for output in (folder, new):
        finetune(settings(inputs, output, overwrite=True, steps=1, elimination=None))

    def names(of):
        found = {str(path.relative_to(of)) for path in of.rglob("*")}
        return {name for name in found if "events" not in name}

    assert names(folder) == names(new)
    assert not (folder / "report").exists()
    assert len(list((folder / "tensorboard").iterdir())) == 1


def test_overwrite_leaves_what_is_no_report_where_reports_are(inputs, run, tmp_path):
    command("report", run)
    report = run / "report"
    plot = (report / "loss.png").rename(tmp_path / "far.png")
    (report / "loss.png").symlink_to(plot)
    (report / "kept_map_2.png").write_bytes(b"mine")
    (report / "notes").write_text("on a lemo report")
    finetune(settings(inputs, run, overwrite=True, steps=1))
    assert {path.name for path in report.iterdir()} == {"loss.png", "kept_map_2.png", "notes"}
    assert plot.exists()
    # Nor is one removed that stands where no run was.
    alone = shutil.copytree(run / "adapter", tmp_path / "alone" / "mine").parent
    command("report", run, "--output", alone / "report")
    before = snapshot(alone / "report")
    finetune(settings(inputs, alone, steps=1))
    assert snapshot(alone / "report") == before


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/step-4", "tensorboard", "log.jsonl"])
def test_overwrite_does_not_follow_links(inputs, run, name):
    elsewhere = run.parent / "elsewhere"
    os.replace(run / name, elsewhere)
    (run / name).symlink_to(elsewhere)
    before = snapshot(run.parent)
    with pytest.raises(FileExistsError, match=f"lemo did not write '{name}'"):
        finetune(settings(inputs, run, overwrite=True))
    assert snapshot(run.parent) == before


@pytest.mark.parametrize(
    "content", ["lr: 1e-4\n", "model: m\ndocuments: d\noutput: .\nsteps: 3\n", None]
)
def test_overwrite_needs_a_run_of_lemo(inputs, run, content):
    """A folder of somebody's project, with a configuration and checkpoints of its own."""
    (run / "config.yaml").unlink()
    if content is not None:
        (run / "config.yaml").write_text(content)
    before = snapshot(run)
    with pytest.raises(FileExistsError, match="lemo did not write 'checkpoints'"):
        finetune(settings(inputs, run, overwrite=True))
    assert snapshot(run) == before


def test_old_checkpoints_with_files_of_somebody_stay(inputs, run, caplog):
    (run / "checkpoints" / "step-2" / "notes").write_text("mine")
    finetune(settings(inputs, run, resume=True, steps=4, keep_checkpoints=1))
    shutil.rmtree(run / "checkpoints" / "step-4")
    shutil.rmtree(run / "adapter")
    finetune(settings(inputs, run, resume=True, steps=4, keep_checkpoints=1))
    assert (run / "checkpoints" / "step-2" / "notes").read_text() == "mine"
    assert "step-2 stays: " in caplog.text


def test_a_new_adapter_keeps_what_somebody_put_beside_it(inputs, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "adapter" / "README.md").write_text("mine")
    shutil.rmtree(run / "checkpoints" / "step-4")
    finetune(settings(inputs, run, resume=True))
    assert (run / "adapter" / "README.md").read_text() == "mine"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda state: state | {"step": 3}, "state.json differs from what was written"),
        (lambda state: state | {"data": "0"}, "state.json differs from what was written"),
        (lambda state: state | {"format": 4}, "state.json: expected format 3, got 4"),
        (lambda state: {k: v for k, v in state.items() if k != "sha256"}, "has no 'sha256'"),
        (lambda state: [], "list indices must be integers"),
        (lambda state: state | {"files": []}, "state.json differs from what was written"),
    ],
)
def test_a_damaged_state_is_noticed(run, caplog, damage, reason):
    file = run / "checkpoints" / "step-4" / "state.json"
    file.write_text(json.dumps(damage(json.loads(file.read_text()))))
    assert newest_checkpoint(run / "checkpoints").step == 2
    assert "step-4 is not whole and is ignored" in caplog.text
    assert reason in caplog.text


def test_a_renamed_checkpoint_is_passed_over_and_takes_no_place(inputs, run, caplog):
    expected = losses(run)
    (run / "checkpoints" / "step-4").rename(run / "checkpoints" / "step-3")
    finetune(settings(inputs, run, resume=True))
    assert "step-3 is not whole and is ignored: expected step 3, as its name says, got 4" in (
        caplog.text
    )
    assert losses(run) == expected
    assert steps(run) == ["step-2", "step-4"]


@pytest.mark.parametrize("version", [1, 2])
def test_checkpoints_of_older_formats_still_resume(inputs, run, tmp_path, monkeypatch, version):
    old = tmp_path / "old"
    with monkeypatch.context() as patch:
        patch.setattr(module, "packed", lambda state: state)
        patch.setattr(checkpoint, "_FORMAT", 2)
        finetune(settings(inputs, old))
    file = old / "checkpoints" / "step-2" / "state.json"
    state = json.loads(file.read_text())
    assert state["format"] == 2
    if version == 1:
        del state["sha256"], state["settings"]
        file.write_text(json.dumps(state | {"format": 1}))
    shutil.rmtree(old / "checkpoints" / "step-4")
    shutil.rmtree(old / "adapter")
    began = []
    finetune(settings(inputs, old, resume=True), lambda record: began.append(record["step"]))
    assert began == [3, 4]
    assert losses(old) == losses(run)
    new = old / "checkpoints" / "step-4"
    assert json.loads((new / "state.json").read_text())["format"] == 3
    written = torch.load(new / "optimizer.pt", weights_only=True)["optimizer"]
    assert written.keys() == {"param_groups", "packed"}


def test_a_moved_run_goes_on_from_another_folder_and_by_other_paths(
    inputs, tmp_path, monkeypatch, capsys
):
    for name in ("model", "d.jsonl"):
        source = inputs / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    sizes = {"context_length": 96, "steps": 4, "save_every": 2, "warmup_steps": 1, "lora_rank": 4}
    start = FinetuneConfig(model="model", documents="d.jsonl", output="run", **sizes)
    finetune(start)
    expected = losses(tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").rename(tmp_path / "elsewhere" / "moved")
    monkeypatch.chdir(tmp_path / "elsewhere")

    def again(*arguments: str) -> str:
        shutil.rmtree("moved/adapter", ignore_errors=True)
        shutil.rmtree("moved/checkpoints/step-4", ignore_errors=True)
        with pytest.raises(SystemExit) as exit_:
            main(["finetune", "--output", "moved", "--resume", *arguments])
        error = capsys.readouterr().err
        assert exit_.value.code == (1 if "error" in error else 0), error
        return error

    assert "resuming moved after step 2" in again()
    (tmp_path / "link").symlink_to("model")
    again("--model", str(tmp_path / "link"), "--documents", "../d.jsonl")
    assert losses(tmp_path / "elsewhere" / "moved") == expected
    recorded = yaml.safe_load((tmp_path / "elsewhere" / "moved" / "config.yaml").read_text())
    assert recorded["documents"] == str(tmp_path / "d.jsonl")
    assert recorded["output"] == str(tmp_path / "elsewhere" / "moved")
    with pytest.raises(SystemExit) as exit_:
        main(["eval", "--adapter", "moved", "--documents", "../d.jsonl", "--lengths", "64"])
    assert not exit_.value.code, capsys.readouterr().err
    # What is gone is named, with what to do; other documents are noticed by what they hold.
    (tmp_path / "d.jsonl").rename(tmp_path / "e.jsonl")
    assert "say with --documents where it is now" in again()
    again("--documents", "../e.jsonl")
    write_documents(tmp_path / "f.jsonl", words=121)
    assert "documents: expected the ones that" in again("--documents", "../f.jsonl")


def test_a_checkpoint_of_a_longer_run_is_refused(inputs, run):
    (run / "config.yaml").write_text(
        (run / "config.yaml").read_text().replace("steps: 4", "steps: 3")
    )
    with pytest.raises(ValueError, match="of this run of 3 steps, but .*step-4' is of another run"):
        finetune(settings(inputs, run, resume=True, steps=3))


def test_a_run_says_what_its_adapter_is(inputs, finished):
    known = json.loads((finished / "adapter" / "model_config.json").read_text())
    weights = (finished / "adapter" / "adapter_model.safetensors").read_bytes()
    assert known["lemo_adapter"] == hashlib.sha256(weights).hexdigest()
    embedding = load_file(inputs / "model" / "model.safetensors")["model.embed_tokens.weight"]
    assert known["lemo_embedding"] == embedding_digest(embedding)


def flip_a_bit(adapter: Path, other: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def cut_in_half(adapter: Path, other: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def take_another(adapter: Path, other: Path) -> None:
    shutil.copy(other / "adapter_model.safetensors", adapter)


def scale_otherwise(adapter: Path, other: Path) -> None:
    file = adapter / "adapter_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"lora_alpha": 7}))


def write_as_another_process_does(adapter: Path) -> None:
    """The names of modules come in another order, and the base model was called by another path."""
    file = adapter / "adapter_config.json"
    content = json.loads(file.read_text())
    content["target_modules"].reverse()
    file.write_text(json.dumps(content | {"base_model_name_or_path": "elsewhere"}))


@pytest.mark.parametrize("change", [flip_a_bit, cut_in_half, take_another, scale_otherwise])
def test_an_adapter_that_is_not_of_the_run_is_written_again(
    inputs, finished, tmp_path, caplog, change
):
    run = shutil.copytree(finished, tmp_path / "run")
    expected = snapshot(run / "adapter")
    other = tmp_path / "other"
    finetune(settings(inputs, other, seed=1, steps=1))
    change(run / "adapter", other / "adapter")
    assert snapshot(run / "adapter") != expected
    finetune(settings(inputs, run, resume=True))
    assert "adapter is not the one of" in caplog.text
    assert snapshot(run / "adapter") == expected
    caplog.clear()
    write_as_another_process_does(run / "adapter")
    finetune(settings(inputs, run, resume=True))
    assert "adapter is not the one of" not in caplog.text


def edit_config(run: Path, other: Path) -> None:
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("learning_rate: 0.0002", "learning_rate: 0.002"))


def take_checkpoint(run: Path, other: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "step-4")
    shutil.copytree(other / "checkpoints" / "step-4", run / "checkpoints" / "step-4")


@pytest.mark.parametrize(
    ("change", "rate", "message"),
    [
        (edit_config, 2e-3, "learning_rate was 0.0002, now 0.002"),
        (take_checkpoint, 2e-4, "learning_rate was 0.002, now 0.0002"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(inputs, run, tmp_path, change, rate, message):
    finetune(settings(inputs, tmp_path / "other", learning_rate=2e-3))
    change(run, tmp_path / "other")
    before = snapshot(run)
    message = f"resume: expected the settings that .*step-4 was trained with, .*: {message}$"
    with pytest.raises(ValueError, match=message):
        finetune(settings(inputs, run, resume=True, learning_rate=rate))
    assert snapshot(run) == before


def test_a_broken_line_of_the_log_drops_no_other(inputs, run, caplog):
    lines = (run / "log.jsonl").read_text().splitlines()
    lines[1] = lines[1][:40]
    (run / "log.jsonl").write_text("\n".join(lines) + "\n")
    shutil.rmtree(run / "checkpoints" / "step-4")
    finetune(settings(inputs, run, resume=True))
    assert [record["step"] for record in read_log(run / "log.jsonl")] == [1, 3, 4]
    assert "log.jsonl: 1 broken line is left out: line 2 (broken JSON" in caplog.text
