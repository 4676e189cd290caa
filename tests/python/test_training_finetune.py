"""Whole runs on a tiny Llama: losses, logs, resuming after a kill, and the adapter they leave."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer

from devices import no_synchronisation, on_gpu
from graph_stand_in import take_the_place_of_graphs
from lemo import LemoConfig, files
from lemo.data import read_documents, token_windows
from lemo.models import one_set_passes
from lemo.models.layers.architectures import Architecture
from lemo.settings.finetune import FinetuneConfig
from lemo.training import finetune as module
from lemo.training.evaluate import evaluate, load_for_evaluation
from lemo.training.finetune import finetune, learning_rate
from lemo.training.model import add_lora, load_config, load_model
from lemo.training.run_log import read_log
from tiny import save_tiny_llama, write_documents

PYTHON_FOLDER = Path(module.__file__).parents[2]
# Random scores have to be drawn as without interruption after a resumption.
ELIMINATION = LemoConfig(
    block_size=16,
    scorer="random",
    layerwise={"dense_layers": [0], "select_at": "all", "keep_schedule": [[0.7, 1.0]]},
)


# Runs that are compared in fp32, and what one GPU has no place for.
on_cpu = pytest.mark.cpu_only
pytestmark = pytest.mark.usefixtures("script_defaults")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    with torch.device("cpu"):
        save_tiny_llama(folder / "model")
    write_documents(folder / "documents.jsonl")
    return folder


@pytest.fixture
def config(inputs, tmp_path):
    return FinetuneConfig(
        model=str(inputs / "model"),
        documents=str(inputs / "documents.jsonl"),
        output=str(tmp_path / "run"),
        context_length=96,
        steps=6,
        warmup_steps=2,
        learning_rate=5e-3,
        lora_rank=4,
        lora_dropout=0.1,
        save_every=3,
        elimination=None,
    )


def losses(folder) -> list[float]:
    return [record["loss"] for record in read_log(Path(folder) / "log.jsonl")]


def environment() -> dict[str, str]:
    """For processes that import lemo from where this one has it, and the rest as it does."""
    folders = [str(PYTHON_FOLDER), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "tensorboard" not in path.parts
    }


@on_cpu
@pytest.mark.parametrize(
    ("device", "elimination"), [("cpu", None), ("auto", ELIMINATION), ("cpu", ELIMINATION)]
)
def test_a_run_stays_on_the_cpu_of_a_machine_with_a_gpu(config, monkeypatch, device, elimination):
    config = config.replace(device=device, elimination=elimination)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
            # An earlier run in this process that took the GPU.
            AcceleratorState._reset_state(reset_partial_state=True)
            assert PartialState(cpu=False).device.type == "cuda"
            assert module._accelerator(config).device == torch.device("cpu")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@on_cpu
def test_losses_are_those_of_a_plain_loop_of_transformers_and_peft(config):
    config = config.replace(batch_size=2, gradient_accumulation=2, lora_dropout=0.0)
    config = config.replace(rope_scaling="none", max_grad_norm=0.02)
    finetune(config)

    torch.manual_seed(config.seed)
    base = load_model(config.model, load_config(config.model), torch.float32)
    model = add_lora(base, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    windows = token_windows(read_documents(config.documents), tokenizer, 96)
    expected = []
    for step in range(config.steps):
        ids = windows.batch(4 * step, 4)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        optimizer.param_groups[0]["lr"] = learning_rate(step + 1, config)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert losses(config.output) == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < expected[0] - 0.01


def test_learning_rate():
    config = FinetuneConfig(
        model="m", documents="d", output="o", steps=10, warmup_steps=2, learning_rate=1.0
    )
    rates = [learning_rate(step, config) for step in range(1, 11)]
    assert rates[:2] == [0.5, 1.0]
    assert [rates[4], rates[7]] == pytest.approx([0.75, 0.25])
    assert 0.0 < rates[9] < 0.1
    assert rates[2:] == sorted(rates[2:], reverse=True)
    constant = config.replace(lr_schedule="constant", warmup_steps=0)
    assert {learning_rate(step, constant) for step in range(1, 11)} == {1.0}


def test_run_folder(config):
    shown = []
    result = finetune(config, shown.append)
    folder = Path(config.output)
    records = read_log(folder / "log.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [r["tokens"] for r in records] == [96] * 6
    least = 10**6 if on_gpu() else 10**7  # tensors of the run alone, or the whole process
    assert all(r["peak_memory_bytes"] > least and r["tokens_per_second"] > 0 for r in records)
    assert all(r["kept_share"] == 1.0 and r["kept"] == [] for r in records)
    assert [s["step"] for s in shown] == [1, 2, 3, 4, 5, 6]
    assert (shown[-1]["steps"], shown[-1]["seconds_left"]) == (6, 0.0)
    assert (result.steps, result.final_loss) == (6, records[-1]["loss"])
    assert result.seconds_per_step == [record["seconds"] for record in records]
    assert sorted(p.name for p in folder.iterdir()) == [
        *("adapter", "checkpoints", "config.yaml", "log.jsonl", "tensorboard")
    ]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-3", "step-6"]
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.value for event in board.Scalars("loss")] == pytest.approx(losses(folder))


def test_run_with_elimination(config):
    config = config.replace(elimination=ELIMINATION, gradient_accumulation=2)
    finetune(config)
    records = read_log(Path(config.output) / "log.jsonl")
    # 6 blocks of 16 tokens, of which layer 1 keeps 3 until progress 0.7 (step 6 of 6 at 5/6).
    assert records[0]["kept"] == [{"attention": 1.0, "mlp": 1.0}, {"attention": 0.5, "mlp": 0.5}]
    assert [record["kept_share"] for record in records] == [0.75] * 5 + [1.0]
    board = EventAccumulator(f"{config.output}/tensorboard").Reload()
    for layer, shares in enumerate(([1.0] * 6, [0.5] * 5 + [1.0])):
        for name in ("attention", "mlp"):
            events = board.Scalars(f"kept/{name}/{layer:03d}")
            assert [(e.step, e.value) for e in events] == list(enumerate(shares, 1))
    kept = json.loads((Path(config.output) / "kept_map.json").read_text())
    assert (kept["block_size"], kept["tokens"]) == (16, 96)
    assert kept["layers"][0] == {"attention": [0, 1, 2, 3, 4, 5], "mlp": [0, 1, 2, 3, 4, 5]}
    blocks = kept["layers"][1]["attention"]
    assert len(blocks) == 3
    assert 5 in blocks, "the last block is always kept"


@pytest.mark.gpu_only
@pytest.mark.parametrize("graphs", ["off", "auto"])
def test_a_step_and_a_checkpoint_are_issued_without_waiting_for_the_gpu(
    config, monkeypatch, graphs
):
    """It would have nothing to do until the host has issued what comes next."""
    step, save, issued = module._Run._step, module._Run._save, []

    def issue(function, number, *arguments):
        # The first passes capture, and read what later ones know.
        if number < 5:
            return function(*arguments)
        with no_synchronisation():
            result = function(*arguments)
        issued.append(function.__name__)
        return result

    monkeypatch.setattr(
        module._Run, "_step", lambda run, number, batches: issue(step, number, run, number, batches)
    )
    monkeypatch.setattr(
        module._Run, "_save", lambda run, folder, number: issue(save, number, run, folder, number)
    )
    elimination = LemoConfig(block_size=16, keep=0.5, cuda_graphs=graphs)
    # The thread that writes the checkpoints would raise, too.
    finetune(config.replace(steps=8, save_every=2, lora_dropout=0.0, elimination=elimination))
    assert issued == [*("_step", "_step", "_save")] * 2


@on_cpu
def test_a_run_reads_the_modules_once(config, monkeypatch):
    """Not in every step, for which a GPU would wait."""
    take_the_place_of_graphs(monkeypatch)
    # A divisor is read where it is on the CPU; here it stands for one on a GPU.
    loss = sys.modules["lemo.ops.linear_cross_entropy"]
    monkeypatch.setattr(loss, "float", lambda x: 1.0, raising=False)
    reads, read = [], one_set_passes.state_of
    monkeypatch.setattr(one_set_passes, "state_of", lambda x: reads.append(1) or read(x))
    settings = LemoConfig(block_size=16, keep=0.5, cuda_graphs="on")
    finetune(config.replace(lora_dropout=0.0, elimination=settings, verify=False))
    assert len(reads) == 1


@on_cpu
def test_deterministic_and_short_turns_hold_during_the_run_only(config):
    seen, turn = [], sys.getswitchinterval()

    def state():
        return torch.are_deterministic_algorithms_enabled(), sys.getswitchinterval() < turn

    for deterministic in (False, True):
        finetune(
            config.replace(steps=1, deterministic=deterministic, overwrite=True),
            lambda record: seen.append(state()),
        )
        assert state() == (False, False)
    assert seen == [(False, True), (True, True)]
    assert torch.utils.deterministic.fill_uninitialized_memory


@on_cpu
def test_keep_1_trains_like_dense_lora(config):
    config = config.replace(lora_dropout=0.0, train_norms=True)
    finetune(config)
    everything = config.replace(output=config.output + "-1", elimination=LemoConfig(keep=1.0))
    finetune(everything)
    assert losses(everything.output) == pytest.approx(losses(config.output), rel=1e-5)


@pytest.mark.parametrize(
    ("elimination", "place"),
    [(None, "in the checkpoint of step 4"), (ELIMINATION, "after step 5")],
    ids=["dense", "lemo"],
)
def test_resume_after_kill_9_gives_the_same_losses(config, elimination, place, tmp_path):
    config = config.replace(elimination=elimination, save_every=2)
    finetune(config)
    killed = config.replace(output=str(tmp_path / "killed"), resume=False)
    (tmp_path / "settings.json").write_text(json.dumps(killed.to_dict()))
    script = f"""
        import json, os, signal, sys
        from lemo import files
        from lemo.settings.finetune import FinetuneConfig
        from lemo.training.finetune import finetune

        def die(*_):
            os.kill(os.getpid(), signal.SIGKILL)

        def progress(record):
            if record["step"] == 5:
                die()

        if {place!r} == "in the checkpoint of step 4":
            replace = os.replace
            files.os.replace = lambda a, b: die() if b.name == "step-4" else replace(a, b)
        config = json.load(open(sys.argv[1]))
        finetune(FinetuneConfig.from_dict(config), progress)
    """
    outcome = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "settings.json")],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert outcome.returncode == -signal.SIGKILL, outcome.stderr
    assert not (tmp_path / "killed" / "adapter").exists()
    assert len(losses(killed.output)) == (5 if place == "after step 5" else 4)

    finetune(killed.replace(resume=True))
    assert losses(killed.output) == losses(config.output)
    one, other = (
        load_file(Path(run.output) / "adapter" / "adapter_model.safetensors")
        for run in (config, killed)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not list((Path(killed.output) / "checkpoints").glob(".*"))


def test_a_checkpoint_with_the_state_of_random_scores_is_resumed_without_it(config, monkeypatch):
    """As lemo wrote them before draws depended on the step alone."""
    config = config.replace(elimination=ELIMINATION)
    finetune(config)
    expected = losses(config.output)
    state = module.random_state
    generator = torch.Generator("cpu").manual_seed(9)
    of_scores = {"progress": 0.5, "random": generator.get_state()}
    monkeypatch.setattr(module, "random_state", lambda: {**state(), "lemo": of_scores})
    again = config.replace(overwrite=True)

    def stop(record):
        if record["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(again, stop)
    monkeypatch.undo()
    finetune(config.replace(resume=True))
    assert losses(config.output) == expected


@pytest.mark.parametrize("damage", ["cut", "missing", "no contents"])
def test_a_damaged_checkpoint_is_passed_over(config, damage, caplog):
    finetune(config)
    newest = Path(config.output) / "checkpoints" / "step-6"
    expected = losses(config.output), {k: len(x) for k, x in snapshot(newest).items()}
    if damage == "cut":
        with (newest / "optimizer.pt").open("r+b") as file:
            file.truncate(100)
    else:
        (newest / ("random-0.pt" if damage == "missing" else "state.json")).unlink()
    finetune(config.replace(resume=True))
    assert "step-6 is not whole and is ignored" in caplog.text
    assert (losses(config.output), {k: len(x) for k, x in snapshot(newest).items()}) == expected


@pytest.mark.parametrize(
    ("block_size", "blocks"), [(96, 1), (40, 3), (24, None), (0.25, None), (0.4, 3)]
)
def test_blocks_that_leave_no_choice_are_named(config, caplog, block_size, blocks):
    elimination = LemoConfig(block_size=block_size)
    finetune(config.replace(steps=1, warmup_steps=0, elimination=elimination))
    tokens = block_size if block_size > 1 else 39
    warned = f"a window of 96 tokens has {blocks} blocks of {tokens}, which leaves little"
    assert (warned in caplog.text) == (blocks is not None)
    assert ("elimination.block_size" in caplog.text) == (blocks is not None)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, None),
        ({"scorer": "random"}, None),
        ({"scorer": "lexical"}, "scorer 'lexical': of no use"),
        ({"keep_relevance": 0.5, "keep_tokens": 9}, "keep_relevance 0.5 and keep_tokens 9: of no"),
    ],
)
def test_settings_for_answers_are_named_where_every_token_has_a_label(
    config, caplog, settings, named
):
    run = config.replace(steps=2, warmup_steps=0)
    finetune(run.replace(elimination=LemoConfig(block_size=16, **settings)))
    assert ("of no use here" in caplog.text) == (named is not None)
    if named is not None:
        assert named in caplog.text
        # As it says, blocks are those of a run without them.
        plain = run.replace(output=config.output + "2", elimination=LemoConfig(block_size=16))
        finetune(plain)
        assert losses(config.output) == losses(plain.output)


@pytest.mark.parametrize(
    ("keep", "block_size", "kept"),
    [(0.5, 0.25, None), (0.4, 0.25, 0.5), (0.8, 0.25, 1), (0.28, 1 / 7, None), (0.4, 2, None)],
)
def test_shares_that_are_rounded_far_up_are_named(config, caplog, keep, block_size, kept):
    elimination = LemoConfig(keep=keep, block_size=block_size)
    finetune(config.replace(steps=1, warmup_steps=0, elimination=elimination))
    warned = f"elimination.keep: {keep:g} of 4 blocks is rounded up to {kept or 0:g} of the tokens"
    assert (warned in caplog.text) == (kept is not None)
    assert ("rounded up" in caplog.text) == (kept is not None)


@pytest.mark.parametrize(("warmup", "warned"), [(1, False), (2, True)])
def test_a_warmup_longer_than_the_run_is_named(config, caplog, warmup, warned):
    finetune(config.replace(steps=1, warmup_steps=warmup))
    message = f"warmup_steps: expected at most the steps of the run, 1, got {warmup}"
    assert (message in caplog.text) == warned


def test_modules_that_run_as_they_are_are_named_once(config, caplog):
    caplog.set_level("INFO", "lemo")
    said = "runs as the module it is, not in lemo's code: "
    run = config.replace(steps=2, warmup_steps=0)
    finetune(run)
    assert said not in caplog.text
    finetune(run.replace(elimination=LemoConfig(path="generic"), overwrite=True))
    assert caplog.text.count(said + "model: the generic path") == 1


def test_resuming_a_run_that_is_done_says_so(config, caplog):
    finetune(config)
    before = snapshot(Path(config.output))
    caplog.set_level("INFO", "lemo")
    result = finetune(config.replace(resume=True))
    assert "all 6 steps are done already" in caplog.text
    assert result.final_loss == losses(config.output)[-1]
    assert snapshot(Path(config.output)) == before


def test_resume_before_the_first_checkpoint_starts_again(config):
    finetune(config)
    expected = losses(config.output)
    for step in ("step-3", "step-6"):
        for file in (Path(config.output) / "checkpoints" / step).iterdir():
            file.unlink()
    finetune(config.replace(resume=True))
    assert losses(config.output) == expected


def test_a_run_is_not_overwritten_by_accident(config):
    finetune(config)
    before = snapshot(Path(config.output))
    with pytest.raises(FileExistsError, match="there is a run in .* --resume .* --overwrite"):
        finetune(config)
    with pytest.raises(ValueError, match="documents: expected at least one of 5000 tokens"):
        finetune(config.replace(overwrite=True, context_length=5000))
    assert snapshot(Path(config.output)) == before
    # What lemo computes otherwise than the model is a model's fault, too.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Architecture, "scale", lambda adapter, index: 3.0)
        with pytest.raises(ValueError, match="model: lemo does not compute what the model"):
            finetune(config.replace(overwrite=True, elimination=ELIMINATION))
    assert snapshot(Path(config.output)) == before
    (Path(config.output) / "notes.txt").write_text("mine")
    finetune(config.replace(overwrite=True, steps=1))
    assert len(losses(config.output)) == 1
    assert (Path(config.output) / "notes.txt").read_text() == "mine"


def test_weights_that_are_no_numbers_any_more_are_not_saved(config):
    """The loss of a step is that before its update, and is finite here."""
    config = config.replace(steps=2, save_every=1, weight_decay=1e300)
    with pytest.raises(FloatingPointError, match="the trained weights are not finite: base_model"):
        finetune(config)
    folder = Path(config.output)
    assert not list((folder / "checkpoints").iterdir())
    assert not (folder / "adapter").exists()


def test_resume_refuses_what_would_change_the_losses(config, inputs, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no run in .* to resume"):
        finetune(config.replace(resume=True))
    documents = tmp_path / "documents.jsonl"
    documents.write_bytes((inputs / "documents.jsonl").read_bytes())
    config = config.replace(documents=str(documents))
    finetune(config)
    changed = config.replace(resume=True, learning_rate=1.0, steps=7)
    with pytest.raises(ValueError, match=r"steps was 6, now 7; learning_rate was 0\.005, now 1"):
        finetune(changed)
    (Path(config.output) / "adapter" / "adapter_config.json").unlink()
    (Path(config.output) / "adapter" / "adapter_model.safetensors").unlink()
    (Path(config.output) / "adapter" / "model_config.json").unlink()
    (Path(config.output) / "adapter").rmdir()
    write_documents(documents, words=121)
    with pytest.raises(ValueError, match="documents: expected the ones that .* was trained on"):
        finetune(config.replace(resume=True))


@pytest.mark.parametrize("name", ["optimizer.pt", "state.json", "log.jsonl"])
def test_a_full_disk_leaves_the_last_checkpoint_whole(config, monkeypatch, name):
    expected = config.replace(output=config.output + "-whole")
    finetune(expected)

    def full(descriptor):
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.startswith(f".{name}."):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        return fsync(descriptor)

    def fill_disk(record):
        if name == "log.jsonl" and record["step"] == 4:
            monkeypatch.setattr(module.RunLog, "write", no_space)
        elif record["step"] == 4:
            monkeypatch.setattr(files.os, "fsync", full)

    def no_space(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    fsync = os.fsync
    with pytest.raises(OSError, match="No space left on device"):
        finetune(config, fill_disk)
    folder = Path(config.output)
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-3"]
    assert not (folder / "adapter").exists()
    monkeypatch.undo()
    finetune(config.replace(resume=True))
    assert losses(config.output) == losses(expected.output)


def test_a_loss_that_is_not_finite_stops_the_run(config):
    config = config.replace(learning_rate=1e30, warmup_steps=0, max_grad_norm=0)
    with pytest.raises(FloatingPointError, match="step 2: the loss is .* learning_rate"):
        finetune(config)
    assert len(losses(config.output)) == 1


@on_cpu
def test_the_adapter_loads_without_lemo(config, tmp_path):
    config = config.replace(train_norms=True, rope_scaling="yarn")
    finetune(config)
    adapter = Path(config.output) / "adapter"
    ids = torch.arange(96)[None]
    script = """
        import sys, torch
        sys.modules["lemo"] = None
        from peft import PeftModel
        from transformers import AutoConfig, AutoModelForCausalLM
        model, adapter, result = sys.argv[1:]
        config = AutoConfig.from_pretrained(adapter + "/model_config.json")
        base = AutoModelForCausalLM.from_pretrained(model, config=config, dtype=torch.float32)
        loaded = PeftModel.from_pretrained(base, adapter)
        torch.save(loaded(input_ids=torch.arange(96)[None]).logits.detach(), result)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), config.model, str(adapter)]
    subprocess.run([*command, str(tmp_path / "logits.pt")], check=True)
    here = load_for_evaluation(config.model, 96, adapter=adapter)
    with torch.no_grad():
        expected = here(input_ids=ids).logits
        base = here.get_base_model()
        assert base.config.rope_parameters["rope_type"] == "yarn"
        with here.disable_adapter():
            untrained = here(input_ids=ids).logits
    logits = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    assert (logits - untrained).abs().max() > 1e-3


def test_training_lowers_the_perplexity_that_evaluate_finds(config):
    config = config.replace(steps=12, learning_rate=2e-2)
    finetune(config)
    lengths = [48, 96]
    before = evaluate(config.model, config.documents, lengths, rope_scaling="linear")
    after = evaluate(config.model, config.documents, lengths, adapter=config.output)
    assert [(r["kind"], r["length"]) for r in after] == [("a", 48), ("b", 48), ("a", 96), ("b", 96)]
    for row, trained in zip(before, after):
        assert trained["perplexity"] < row["perplexity"] - 1


@pytest.mark.parametrize("elimination", [None, ELIMINATION], ids=["dense", "lemo"])
def test_bfloat16_and_gradient_checkpointing(config, elimination):
    config = config.replace(elimination=elimination, lora_dropout=0.0)
    finetune(config)
    lean = config.replace(
        output=config.output + "-lean", dtype="bfloat16", gradient_checkpointing=True
    )
    finetune(lean)
    assert losses(lean.output) == pytest.approx(losses(config.output), abs=0.02)
    weights = load_file(Path(lean.output) / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@on_cpu
def test_two_processes_train_like_one_with_twice_the_batch(config, tmp_path):
    config = config.replace(lora_dropout=0.0, steps=4, save_every=2)
    finetune(config.replace(batch_size=2))
    settings = config.to_dict() | {"output": str(tmp_path / "two")}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    script = """
        import json, sys
        from lemo.settings.finetune import FinetuneConfig
        from lemo.training.finetune import finetune
        config = FinetuneConfig.from_dict(json.load(open(sys.argv[1])))
        finetune(config)
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run(
        [*launch, str(tmp_path / "script.py"), str(tmp_path / "settings.json")],
        env=environment(),
        check=True,
    )
    assert losses(tmp_path / "two") == pytest.approx(losses(config.output), rel=1e-6)
    checkpoint = tmp_path / "two" / "checkpoints" / "step-4"
    assert (checkpoint / "random-1.pt").is_file()
    with pytest.raises(
        ValueError, match="written by 2 processes .* gradient_accumulation 2, got 1"
    ):
        finetune(FinetuneConfig.from_dict(settings | {"resume": True}))
