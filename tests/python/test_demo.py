"""The demo at its smallest: what it leaves, whose figures it shows, and its errors."""

import json
import math
import re
import statistics

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from lemo.cli.main import app
from lemo.data import open_training_data, read_documents
from lemo.demo.base import BaseConfig, train_base
from lemo.demo.corpus import python_sources, train_tokenizer, write_corpus
from lemo.demo.facts import KINDS, Prompter, fact_line
from lemo.demo.run import DemoSettings, run_demo, run_method
from lemo.report import load_run
from lemo.settings.finetune import FinetuneConfig
from limits import largest_file
from tiny import tiny_tokenizer

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
    assert [result["name"] for result in content["results"]] == ["dense", "lemo_steps", "lemo"]
    for result in content["results"]:
        log = read_log(output / result["name"])
        assert result["seconds_per_step"] == [record["seconds"] for record in log]
        assert result["peak_bytes"] == max(record["peak_memory_bytes"] for record in log)
        assert 0 < result["baseline_bytes"] < result["peak_bytes"]
        seconds = statistics.median(record["seconds"] for record in log)
        row = next(line for line in printed.splitlines() if "seconds a step" in line)
        assert f"{seconds:.2f}" in row
    dense, same_steps, same_time = content["results"]
    assert dense["kept_share"] == 1.0
    assert len(same_steps["seconds_per_step"]) == len(dense["seconds_per_step"])
    for lemo in (same_steps, same_time):
        assert lemo["kept_share"] == pytest.approx(0.25, abs=0.02)


def test_demo_answers_are_those_of_plain_transformers_and_peft(finished):
    """An independent evaluation of the adapter on the held-out prompts gives the same figures."""
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
    lines = (output / "corpus" / "heldout_prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["messages"] for line in lines]

    def figures(evaluated):
        """Exact answers, their number, and the perplexity of their tokens."""
        evaluated.eval()
        exact, losses = [], []
        for messages in prompts:
            text = ""
            for message in messages:
                before = len(tokenizer(text)["input_ids"])
                text += message["content"] + ("\n" if message["role"] == "assistant" else "")
                if message["role"] != "assistant":
                    continue
                ids = torch.tensor([tokenizer(text)["input_ids"]])
                with torch.no_grad():
                    logits = evaluated(input_ids=ids).logits[0, before - 1 : -1]
                exact.append(bool((logits.argmax(-1) == ids[0, before:]).all()))
                losses += cross_entropy(logits, ids[0, before:], reduction="none").tolist()
        return sum(exact) / len(exact), len(exact), math.exp(statistics.fmean(losses))

    expected = {"before": figures(model)}
    expected["lemo"] = figures(PeftModel.from_pretrained(model, output / "lemo" / "adapter"))
    for name, (exact, count, perplexity) in expected.items():
        found = content["answers"][name]
        assert (found["exact"], found["answers"]) == (exact, count)
        assert found["perplexity"] == pytest.approx(perplexity, rel=1e-4)
        assert f"{perplexity:.2f}" in printed
    assert read_json(output / "lemo" / "metrics.json") == [content["answers"]["lemo"]]


def test_demo_leaves_the_report_of_its_runs(finished):
    output, _ = finished
    page = (output / "report" / "index.html").read_text()
    assert "lemo, keep 0.25, lexical scores" in page
    assert "planted in Python sources of 512 tokens" in page
    table = page.partition("Exact answers, held-out prompts")[2].partition("</table>")[0]
    heads = re.findall(r'colspan="2">(.*?)</th>', table)
    assert heads == ["before", "dense LoRA", "lemo, same steps", "lemo, same time"]
    answers = read_json(output / "demo.json")["answers"]
    shown = re.findall(r'class="number first">([\d.]+)%</td><td class="number">([\d.,]+)<', table)
    assert shown == [
        (f"{row['exact'] * 100:.1f}", f"{row['perplexity']:,.3f}") for row in answers.values()
    ]
    assert {path.name for path in (output / "report").glob("*.png")} == {
        "loss.png",
        "resources.png",
        "relevance_3.png",
        *(f"kept_{what}_{run}.png" for what in ("share", "map") for run in (2, 3)),
    }
    picture = load_run(output / "lemo").relevance
    for question in picture.questions:
        assert f"{question.question} <strong>{question.answer}</strong>" in page


def test_the_picture_tells_what_a_step_keeps_and_why(finished):
    """Kept blocks by the definition: those with labels, then the best scores; facts where they
    stand in the tokens; words that question and block really share."""
    output, _ = finished
    picture = load_run(output / "lemo").relevance
    tokenizer = AutoTokenizer.from_pretrained(output / "base")
    line = (output / "corpus" / "heldout_prompts.jsonl").read_text().splitlines()[0]
    row = json.loads(line)
    ids = tokenizer(tokenizer.apply_chat_template(row["messages"], tokenize=False))["input_ids"]
    assert picture.tokens == len(ids)
    size = picture.block_size
    blocks = [ids[start : start + size] for start in range(0, len(ids), size)]
    assert len(picture.scores) == len(blocks)
    first = len(tokenizer(row["messages"][0]["content"])["input_ids"]) - 1
    count = math.ceil(0.25 * len(blocks))
    always = list(range(first // size, len(blocks)))
    best = sorted(range(first // size), key=lambda block: -picture.scores[block])
    expected = sorted(always + best[: count - len(always)])
    assert sorted(picture.kept) == expected
    assert len(picture.facts) == len(row["facts"])
    for fact in picture.facts:
        text = tokenizer.decode(ids[fact.token :])
        assert text.startswith(fact.text)
        asked = [q for q in picture.questions if q.question.split()[-1] == fact.text.split()[1]]
        assert fact.asked == bool(asked)
        if asked:
            assert fact.text.endswith(f" {asked[0].answer}")
    for question in picture.questions:
        shares = [best.score for best in question.blocks]
        assert shares == sorted(shares, reverse=True)
        for best in question.blocks:
            words = {tokenizer.decode([token]).strip() for token in blocks[best.block]}
            assert set(best.words) <= words


def test_prompts_fit_and_hold_what_is_asked(tmp_path):
    sources = tmp_path / "sources.jsonl"
    text = "".join(f"    value_{number} = call({number})\n" for number in range(2000))
    sources.write_text(json.dumps({"text": text}) + "\n")
    tokenizer = train_tokenizer(sources, 700)
    prompter = Prompter(sources, tokenizer, seed=3)
    for tokens in (96, 512, 4000):
        for _ in range(10):
            row = prompter.conversation(tokens, facts=4, asked=2)
            whole = tokenizer.apply_chat_template(row["messages"], tokenize=False)
            assert 0.75 * tokens < len(tokenizer(whole)["input_ids"]) <= tokens
            prompt = row["messages"][0]["content"]
            assert len(row["facts"]) == 4
            for kind, value in row["facts"].items():
                assert prompt.count(fact_line(kind, value)) == 1
            turns = list(zip(row["messages"][::2], row["messages"][1::2], strict=True))
            assert len(turns) == 2
            for user, assistant in turns:
                kind = user["content"].rpartition("# which ")[2]
                assert assistant["content"] == f" {row['facts'][kind]}"
    # The same seed gives the same prompts.
    again = Prompter(sources, tokenizer, seed=3)
    first = Prompter(sources, tokenizer, seed=3).conversation(96, 4, 2)
    assert again.conversation(96, 4, 2) == first


def test_values_belong_to_one_kind():
    values = [value for of_kind in KINDS.values() for value in of_kind]
    assert len(values) == len(set(values))


def test_demo_does_not_write_into_somebody_elses_folder(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="output: expected an empty folder or an earlier"):
        run_demo(tmp_path, DemoSettings.quick(), Console(quiet=True))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_demo_that_is_replaced_and_interrupted_leaves_no_report(tmp_path, monkeypatch):
    """It would be beside what the new demo has made, and tell of the old one."""
    (tmp_path / "demo.json").write_text('{"settings": {}}')
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "index.html").write_text("<p>lemo report</p>")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lemo.demo.run.write_corpus", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path, DemoSettings.quick(), Console(quiet=True))
    assert not (tmp_path / "report").exists()


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
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "the block of", "completion": " tokens"}) + "\n")
    sizes = {"vocabulary": 257, "hidden": 32, "intermediate": 64, "layers": 1, "context": 32}
    config = BaseConfig(**sizes, first_context=32, batch_tokens=64, steps=1)
    prompts = {32: open_training_data(pairs, tiny_tokenizer(), 32)}
    # The configuration is smaller than this, the weights larger.
    with largest_file(12_000), pytest.raises(OSError, match="base model cannot be written"):
        train_base(tmp_path / "base", prompts, tiny_tokenizer(), config, lambda step, loss: None)


def test_failure_of_a_fine_tuning_is_told_with_its_reason(tmp_path):
    config = FinetuneConfig(model=str(tmp_path / "absent"), documents="x", output=str(tmp_path))
    with pytest.raises(ChildProcessError, match=r"fine-tuning 'dense'.*absent.* is neither"):
        run_method("dense", config, tmp_path / "dense.yaml", Silent())


def test_help_has_the_steps_that_are_taken():
    shown = CliRunner().invoke(app, ["demo", "--help"], env={"COLUMNS": "200"}).output
    assert f"{DemoSettings().steps}, or {DemoSettings.quick().steps} with --quick" in shown
