"""lemo finetune and lemo eval as a user calls them, and what every mistake says."""

import json
import math
import signal
import threading
from pathlib import Path

import pytest
import torch
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.nn.functional import cross_entropy
from torch.utils.tensorboard import FileWriter
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM

from lemo.cli.main import main
from lemo.cli.progress import StepProgress
from limits import largest_file
from tiny import save_tiny_llama, write_documents

# The command line; test_training_finetune.py runs on a GPU.
pytestmark = pytest.mark.cpu_only


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_llama(folder / "model")
    write_documents(folder / "documents.jsonl")
    opt = OPTConfig(
        vocab_size=257,
        hidden_size=16,
        ffn_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        word_embed_proj_dim=16,
        max_position_embeddings=64,
    )
    OPTForCausalLM(opt).save_pretrained(folder / "opt")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "opt" / name).write_bytes((folder / "model" / name).read_bytes())
    return folder


@pytest.fixture
def lemo(capsys, inputs, tmp_path, monkeypatch):
    """Runs a command line; {model}, {documents} and the like stand for the inputs."""
    monkeypatch.chdir(tmp_path)

    def run(line: str) -> tuple[int, str, str]:
        names = {"model": inputs / "model", "documents": inputs / "documents.jsonl"}
        with pytest.raises(SystemExit) as exit_:
            main(line.format(**names, opt=inputs / "opt").split())
        captured = capsys.readouterr()
        return exit_.value.code, captured.out, captured.err

    return run


TRAIN = "finetune --model {model} --documents {documents} --output run --context-length 96"
SHORT = TRAIN + " --dense --steps 2 --lora-rank 4"


def test_finetune_then_eval(lemo):
    code, out, err = lemo(SHORT + " --set warmup_steps=0 --learning-rate 0.01")
    assert (code, out) == (0, "")
    lines = err.splitlines()
    assert lines[0].startswith("step 1/2  loss 5.5")
    assert lines[-1] == "adapter: run/adapter"
    code, out, err = lemo(
        "eval --adapter run --documents {documents} --lengths 64,96 --json result.json"
    )
    assert (code, err) == (0, "")
    assert "last quarter" in out
    rows = json.loads(Path("result.json").read_text())
    assert json.loads(Path("run/metrics.json").read_text()) == rows
    assert [(r["kind"], r["length"], r["documents"]) for r in rows] == [
        ("a", 64, 2),
        ("b", 64, 2),
        ("a", 96, 2),
        ("b", 96, 2),
    ]


def test_rows_of_evaluations_stay_until_the_same_are_evaluated_again(lemo, inputs):
    assert lemo(SHORT)[0] == 0
    write_documents(Path("others.jsonl"), count=2)

    def rows():
        found = json.loads(Path("run/metrics.json").read_text())
        return {(Path(r["source"]).name, r["kind"], r["length"]): r for r in found}, len(found)

    line = "eval --adapter run --documents {documents} --lengths "
    assert lemo(line + "64")[0] == 0
    first, _ = rows()
    assert lemo(line + "48")[0] == 0
    assert lemo("eval --adapter run --documents others.jsonl --lengths 64")[0] == 0
    found, count = rows()
    assert found.items() > first.items()
    assert {place[::2] for place in found} == {
        ("documents.jsonl", 64),
        ("documents.jsonl", 48),
        ("others.jsonl", 64),
    }
    assert lemo(line + "64 --limit 1")[0] == 0
    again, same = rows()
    assert (again.keys(), same) == (found.keys(), count)
    changed = {place for place in again if again[place] != found[place]}
    assert {place[::2] for place in changed} == {("documents.jsonl", 64)}
    Path("run/metrics.json").write_text("{}")
    code, _, err = lemo(line + "64")
    assert (code, err.count("\n")) == (1, 1)
    assert "metrics.json: expected a list of objects, got dict" in err


def test_a_perplexity_beyond_all_numbers_is_null_in_json(lemo, inputs):
    model = AutoModelForCausalLM.from_pretrained(inputs / "model")
    with torch.no_grad():
        model.lm_head.weight *= 1e9
    model.save_pretrained("m")
    AutoTokenizer.from_pretrained(inputs / "model").save_pretrained("m")
    code, out, _ = lemo("eval --model m --documents {documents} --lengths 64 --json r.json")
    assert (code, "inf" in out) == (0, True)
    found = json.loads(Path("r.json").read_text(), parse_constant=pytest.fail)
    assert [(row["perplexity"], row["tail_perplexity"]) for row in found] == 2 * [(None, None)]


def test_products_in_8_bits(lemo):
    """They change the losses, by a little, and nothing else of a run."""
    losses = []
    for name, more in (("run", " --fp8"), ("plain", "")):
        line = TRAIN.replace("--output run", f"--output {name}") + " --steps 3 --lora-rank 4"
        code, _, err = lemo(line + " --learning-rate 0.01 --keep 0.5" + more)
        assert code == 0, err
        log = [json.loads(line) for line in Path(f"{name}/log.jsonl").read_text().splitlines()]
        losses.append([record["loss"] for record in log])
        config = json.loads(Path(f"{name}/adapter/adapter_config.json").read_text())
        assert config["r"] == 4
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert "products: fp8" in Path("run/config.yaml").read_text()


def test_layers_in_8_bits_say_nothing_at_each_call(lemo, caplog):
    pytest.importorskip("bitsandbytes")
    assert lemo(TRAIN + " --quantize int8 --steps 1")[0] == 0
    assert lemo("eval --adapter run --documents {documents} --lengths 64")[0] == 0
    said = [r.getMessage() for r in caplog.records if r.name.startswith("bitsandbytes")]
    assert not [message for message in said if "MatMul8bitLt" in message]


def test_eval_is_the_perplexity_that_transformers_gives(lemo, inputs):
    documents = [json.loads(line) for line in (inputs / "documents.jsonl").open()]
    model = AutoModelForCausalLM.from_pretrained(inputs / "model")
    tokenizer = AutoTokenizer.from_pretrained(inputs / "model")
    losses = []
    for document in documents[::2]:
        ids = torch.tensor(tokenizer(document["text"])["input_ids"][:40])
        logits = model(input_ids=ids[None]).logits[0, :-1]
        losses.append(cross_entropy(logits, ids[1:], reduction="none").detach())
    losses = torch.stack(losses)
    assert lemo("eval --model {model} --documents {documents} --lengths 40 --json r.json")[0] == 0
    row = json.loads(Path("r.json").read_text())[0]
    assert (row["kind"], row["documents"]) == ("a", 2)
    assert row["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    # The last quarter of 40 tokens is tokens 30 to 39, predicted at places 29 to 38.
    assert row["tail_perplexity"] == pytest.approx(math.exp(losses[:, 29:].mean()), rel=1e-5)


def test_eval_leaves_short_documents_out_and_says_so(lemo, inputs):
    records = (inputs / "documents.jsonl").read_text() + '{"text": "short"}\n'
    Path("d.jsonl").write_text(records)
    code, _, err = lemo("eval --model {model} --documents d.jsonl --lengths 64 --limit 1 --json r")
    assert code == 0
    assert err == "1 of 5 documents are shorter than 64 tokens and are left out\n"
    assert [row["documents"] for row in json.loads(Path("r").read_text())] == [1, 1]


def test_yaml_file_and_resume_with_the_settings_of_the_run(lemo, inputs):
    Path("c.yaml").write_text(
        f"model: {inputs / 'model'}\ndocuments: {inputs / 'documents.jsonl'}\noutput: run\n"
        "context_length: 96\nsteps: 9\nlora_rank: 4\nelimination: null\n"
    )
    assert lemo("finetune --config c.yaml --steps 2")[0] == 0
    assert len(Path("run/log.jsonl").read_text().splitlines()) == 2
    code, _, err = lemo("finetune --output run --resume")
    assert (code, err.splitlines()[0]) == (0, "run: all 2 steps are done already")
    code, _, err = lemo("finetune --config c.yaml --resume")
    assert (code, err) == (
        1,
        "lemo: error: resume: the run in 'run' has other settings: steps was 2, now 9\n",
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (TRAIN + " --steps 0", "steps: expected an integer in [1, 2147483647], got 0"),
        (TRAIN + " --set stepz=1", "unknown setting 'stepz'; did you mean steps"),
        (TRAIN + " --set elimination.kep=1", "did you mean keep"),
        (TRAIN + " --keep 2", "elimination.keep: expected"),
        (TRAIN + " --config none.yaml", "'none.yaml' does not exist"),
        (TRAIN + " --recompute layer,none,none", "recompute: expected 2 entries, one for each"),
        (
            TRAIN + " --recompute layer,none,none --memory-limit 4",
            "recompute: expected 2 entries, one for each",
        ),
        ("finetune --output run --resume", "output: there is no run in 'run' to resume"),
        ("finetune --output gpt2 --resume", "output: there is no run in 'gpt2' to resume"),
        (TRAIN + " --documents broken.parquet", "broken.parquet: cannot be read as parquet"),
        (
            TRAIN + " --set elimination.layerwise.dense_layers=[7]",
            "dense_layers: expected layers between",
        ),
        (TRAIN + " --rope-scaling longrope", "rope_scaling: expected one of"),
        (TRAIN + " --device cpu --dtype float16", "dtype: float16 needs a GPU"),
        (TRAIN + " --device gpu", "device: expected one of auto, cpu, cuda"),
        (TRAIN + " --recompute all", "elimination.recompute: expected one of auto, none"),
        (TRAIN + " --predictor none", "expected a folder written by 'lemo prepare'"),
        (TRAIN + " --fp8 --dense", "--dense: expected no setting of elimination beside"),
        (TRAIN + " --fp8 --quantize nf4", "quantize: expected null or float8 beside"),
        (TRAIN + " --fp8 --set shard=true", "shard: expected false beside"),
        (TRAIN + " --fp8 --set elimination.path=generic", "products: expected 'dtype' in the gen"),
        (TRAIN + " --predictor p --dense", "--dense: expected no setting of elimination beside"),
        (TRAIN + " --context-length 9999", "all 4 documents are shorter"),
        (TRAIN + " --lora-targets w_query", "lora_targets: "),
        (TRAIN + " --resume", "there is no run in 'run' to resume"),
        (TRAIN + " --documents none.jsonl", "'none.jsonl' does not exist"),
        (TRAIN + " --documents broken.jsonl", "broken.jsonl:2: not JSON"),
        (TRAIN + " --model none", "'none' is neither a folder nor a model"),
        (TRAIN + " --model {opt}", "context_length: expected at most 64, got 96"),
        (TRAIN + " --model gpt2", "'gpt2' has no tokenizer"),
        (TRAIN + " --model bert", "model: expected a causal language model, got 'bert'"),
        ("finetune --model {model}", "documents: expected a value, got none"),
        ("eval --documents {documents} --lengths 64", "--model, --adapter: expected at least"),
        ("eval --model {model} --documents {documents} --lengths 1", "lengths: expected an int"),
        ("eval --model {model} --documents {documents} --lengths 999", "4 documents are shorter"),
        ("eval --model {opt} --documents {documents} --lengths 96", "error: lengths: expected at"),
        ("eval --adapter none --documents {documents} --lengths 64", "adapter: expected a PEFT"),
        (
            "eval --model {model} --documents {documents} --lengths 9 --device x",
            "--device: expected",
        ),
        (
            "eval --model {model} --documents {documents} --lengths 9 --dtype float16 --device cpu",
            "float16 needs",
        ),
        (
            "eval --model none --documents none --lengths 9 --json no/r.json",
            "--json: expected a file",
        ),
        ("eval --model {model} --documents {documents} --lengths 9 --dtype x", "--dtype: expected"),
        ("eval --model {model} --documents {documents} --lengths 9 --limit 0", "limit: expected"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(lemo, line, message, tmp_path):
    Path("broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    Path("broken.parquet").write_text("nothing of the kind")
    Path("gpt2").mkdir()
    Path("gpt2/config.json").write_text('{"model_type": "gpt2"}')
    Path("bert").mkdir()
    Path("bert/config.json").write_text('{"model_type": "vits"}')
    before = sorted(tmp_path.rglob("*"))
    code, out, err = lemo(line)
    assert (code, out) == (1, "")
    assert err.startswith("lemo: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert sorted(tmp_path.rglob("*")) == before


def test_the_system_refuses_to_write_a_checkpoint(lemo):
    # The logs of two steps are smaller than this, the weights of the adapter larger.
    with largest_file(12_000):
        code, _, err = lemo(SHORT)
    assert code == 1
    message = err.splitlines()[-1]
    assert message.startswith("lemo: error: File too large: ")
    assert message.endswith("adapter_model.safetensors")
    assert "Traceback" not in err
    assert not list(Path("run").rglob("*.tmp"))
    assert not list(Path("run/checkpoints").iterdir())
    assert lemo("finetune --output run --resume")[0] == 0


@pytest.mark.parametrize("longest", ["run/log.jsonl", "run/tensorboard"])
def test_the_system_refuses_to_write_the_logs(lemo, monkeypatch, longest):
    # TensorBoard's file has a thread of its own, which would print what it cannot write.
    shown = []
    monkeypatch.setattr(threading, "excepthook", shown.append)
    if longest == "run/tensorboard":
        tags = dict.fromkeys(("loss", *(f"a long name of the loss, {n}" for n in range(200))), 1.0)
        add = FileWriter.add_summary
        longer = Summary(value=[{"tag": tag, "simple_value": x} for tag, x in tags.items()])
        monkeypatch.setattr(
            FileWriter, "add_summary", lambda self, summary, step: add(self, longer, step)
        )
    with largest_file(1500):
        code, _, err = lemo(SHORT.replace("--steps 2", "--steps 30"))
    assert code == 1
    assert "Traceback" not in err
    assert err.splitlines()[-1] == f"lemo: error: File too large: {longest}"
    assert shown == []
    lines = Path("run/log.jsonl").read_text().splitlines(keepends=True)
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert lines[-1].endswith("\n")
    assert longest == "run/log.jsonl" or len(lines) == 1, "the run went on"


def test_interrupted(lemo, monkeypatch):
    show = StepProgress.__call__

    def interrupt(self, record):
        show(self, record)
        if record["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(StepProgress, "__call__", interrupt)
        code, _, err = lemo(
            SHORT.replace("--steps 2", "--steps 4 --save-every 2 --set warmup_steps=1")
        )
    assert code == 130
    assert err.splitlines()[-1] == "lemo: interrupted"
    assert "to go on: lemo finetune --output run --resume" in err
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["step-2"]
    code, _, err = lemo("eval --adapter run --documents held_out.jsonl --lengths 48")
    assert code == 1
    assert "adapter: the run in 'run' is not done" in err
    code, _, err = lemo("finetune --output run --resume")
    assert code == 0
    assert err.splitlines()[0] == "resuming run after step 2"
    lines = Path("run/log.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == [1, 2, 3, 4]
