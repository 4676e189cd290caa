"""The demo at its smallest: what it leaves, whose figures it shows, and its errors."""

import json
import math
import statistics

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from lemo.data import read_documents
from lemo.demo.base import BaseConfig, train_base
from lemo.demo.corpus import python_sources, train_tokenizer, write_corpus
from lemo.demo.run import DemoSettings, run_demo, run_method
from lemo.settings.finetune import FinetuneConfig
from limits import largest_file
from tiny import tiny_tokenizer, write_documents

# The demo is one of the CPU.
pytestmark = pytest.mark.cpu_only


class Silent:
    """A stage of the demo that nobody looks at."""

    def update(self, done, total, note=""):
        pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder of a quick demo, what it printed)."""
    output = tmp_path_factory.mktemp("demo") / "run"
    console = Console(record=True, width=120)
    run_demo(output, DemoSettings.quick(), console)
    return output, console.export_text()


def read_json(path):
    return json.loads(path.read_text())


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_demo_prints_what_its_runs_logged(finished):
    output, printed = finished
    content = read_json(output / "demo.json")
    for result in content["results"]:
        log = read_log(output / result["name"])
        assert result["seconds_per_step"] == [record["seconds"] for record in log]
        assert result["peak_bytes"] == max(record["peak_memory_bytes"] for record in log)
        assert 0 < result["baseline_bytes"] < result["peak_bytes"]
        seconds = statistics.median(record["seconds"] for record in log)
        row = next(line for line in printed.splitlines() if "seconds a step" in line)
        assert f"{seconds:.2f}" in row
    dense, lemo = content["results"]
    assert dense["kept_share"] == 1.0
    # Its defaults: two of four quarters in every layer.
    assert lemo["kept_share"] == pytest.approx(0.5)


def test_demo_perplexity_is_that_of_plain_transformers_and_peft(finished):
    """An independent evaluation of the adapter on the held-out documents gives the same figure."""
    output, printed = finished
    content = read_json(output / "demo.json")
    length = content["settings"]["context"]
    tokenizer = AutoTokenizer.from_pretrained(output / "base")
    model = AutoModelForCausalLM.from_pretrained(
        output / "base",
        rope_parameters={
            "rope_type": "linear",
            "factor": length / content["settings"]["base"]["context"],
            "rope_theta": 10000.0,
        },
        max_position_embeddings=length,
    )
    windows = [
        torch.tensor([tokenizer(document.text)["input_ids"][:length]])
        for document in read_documents(output / "corpus" / "heldout.jsonl")
    ]

    def perplexity(evaluated):
        evaluated.eval()
        with torch.no_grad():
            losses = [evaluated(input_ids=ids, labels=ids).loss.item() for ids in windows]
        return math.exp(statistics.fmean(losses))

    figures = content["perplexities"]
    assert figures["before"]["perplexity"] == pytest.approx(perplexity(model), rel=1e-4)
    adapted = PeftModel.from_pretrained(model, output / "lemo" / "adapter")
    assert figures["lemo"]["perplexity"] == pytest.approx(perplexity(adapted), rel=1e-4)
    assert f"{figures['lemo']['perplexity']:.2f}" in printed


def test_demo_leaves_the_report_of_both_runs(finished):
    output, _ = finished
    page = (output / "report" / "index.html").read_text()
    assert "lemo, keep 0.5" in page
    assert "dense LoRA" in page
    assert {path.name for path in (output / "report").glob("*.png")} == {
        "loss.png",
        "resources.png",
        "kept_share_1.png",
        "kept_map_1.png",
    }


def test_demo_does_not_write_into_somebody_elses_folder(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="output: expected an empty folder or an earlier"):
        run_demo(tmp_path, DemoSettings.quick(), Console(quiet=True))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_corpus_is_the_same_every_time_and_holds_out_whole_documents(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        write_corpus(folder, held_out=2, held_out_characters=2000, limit=200_000)
    assert (first / "train.jsonl").read_bytes() == (second / "train.jsonl").read_bytes()
    train = {document.id: document.text for document in read_documents(first / "train.jsonl")}
    held_out = list(read_documents(first / "heldout.jsonl"))
    assert len(held_out) == 2
    for document in held_out:
        assert document.id not in train
        assert len(document.text) >= 2000
    assert sum(map(len, train.values())) + sum(len(d.text) for d in held_out) <= 200_000


def test_corpus_needs_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected 4 Python sources of 2000 characters"):
        write_corpus(tmp_path, held_out=2, held_out_characters=2000, limit=1000)
    assert any(python_sources())


def test_tokenizer_is_lossless(tmp_path):
    (tmp_path / "text.txt").write_text("def f(x):\n    return x  # naïve\n" * 20)
    tokenizer = train_tokenizer(tmp_path / "text.txt", 300)
    text = "class Ünïcode:\n\tpass\n\n\n    x = '\u4e2d'\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_full_disk_while_the_base_model_is_written(tmp_path):
    documents = write_documents(tmp_path / "documents.jsonl")
    sizes = {"vocabulary": 257, "hidden": 32, "intermediate": 64, "layers": 1, "context": 32}
    config = BaseConfig(**sizes, steps=1)
    # The configuration is smaller than this, the weights larger.
    with largest_file(12_000), pytest.raises(OSError, match="base model cannot be written"):
        train_base(tmp_path / "base", documents, tiny_tokenizer(), config, lambda step, loss: None)


def test_failure_of_a_fine_tuning_is_told_with_its_reason(tmp_path):
    config = FinetuneConfig(model=str(tmp_path / "absent"), documents="x", output=str(tmp_path))
    with pytest.raises(ChildProcessError, match=r"fine-tuning 'dense'.*absent.* is neither"):
        run_method("dense", config, tmp_path / "dense.yaml", Silent())
