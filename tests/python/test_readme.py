"""README.md: its Python runs, its figures are in the results, its files and commands exist."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import readme_table
from lemo import LemoConfig

# The README's text and figures.
pytestmark = pytest.mark.cpu_only

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
SHELL = "\n".join(re.findall(r"^```sh\n(.*?)^```", README, re.DOTALL | re.MULTILINE))
# Its command lines, continued ones in one line.
COMMANDS = re.findall(r"^lemo (\w+)(.*)$", SHELL.replace("\\\n", ""), re.MULTILINE)


def test_python_of_the_readme_runs_on_a_tiny_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 14
    batches = [torch.randint(0, 64, (1, 256)) for _ in range(3)]
    names = {"batches": batches}
    exec(code.replace("path/to/model", str(tmp_path / "base")), names)
    # The handle is gone, and the adapter was trained.
    assert "forward" not in vars(names["model"].get_base_model())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    weights = [p for name, p in adapted.named_parameters() if "lora_B" in name]
    assert weights
    assert all(weight.abs().sum() > 0 for weight in weights)


def _options(commands):
    return [(command, dict(re.findall(r"--([a-z-]+) (\S+)", rest))) for command, rest in commands]


def test_settings_of_the_readme_are_those_of_its_command():
    from lemo.settings.finetune import FinetuneConfig

    (text,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    config = FinetuneConfig.from_dict(yaml.safe_load(text))
    finetune = next(given for command, given in _options(COMMANDS) if command == "finetune")
    assert int(finetune["context-length"]) == config.context_length
    assert float(finetune["keep"]) == config.elimination.keep
    assert (finetune["output"], finetune["model"]) == (config.output, config.model)
    # What is not said is the default.
    assert config.elimination == LemoConfig(keep=config.elimination.keep)


def test_commands_of_the_page_on_answers_fit_together():
    text = (ROOT / "docs/ANSWERS.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^lemo (\w+(?: heads| scores| check)?) (.*)$", text, re.MULTILINE)
    made = {
        name: next(given["output"] for command, given in _options(commands) if command == name)
        for name in ("relevance heads", "relevance scores", "prepare")
    }
    used = {name: given for _, given in _options(commands) for name in given}
    assert used["heads"]["heads"] == made["relevance heads"]
    assert used["scores"]["scores"] == made["relevance scores"]
    assert used["predictor"]["predictor"] == made["prepare"]


def test_figures_are_those_of_the_results():
    assert readme_table.updated(README) == README


def test_the_steps_of_the_first_paragraphs_are_those_of_the_table():
    _, _, rest = README.partition("<!-- comparison: begin -->")
    table, _, _ = rest.partition("<!-- comparison: end -->")
    rows = [line.split("|") for line in table.splitlines() if line.startswith("|")]
    lines = [[cell.strip() for cell in row] for row in rows]
    at = lines[0].index("65536 tokens")
    cells = {line[1]: line[at] for line in lines[2:] if " s, " in line[at]}
    steps = {name: cell.replace(" s, ", " s and ") for name, cell in cells.items()}
    others = [name for name in steps if not name.startswith(("lemo", "LongLoRA"))]
    # A star marks a time that has too much in it.
    fastest = min(others, key=lambda name: float(cells[name].split()[0].rstrip("*")))
    planned, _ = cells["lemo, keep 0.5, planned"].split(",")
    text = " ".join(README.split())
    assert f"with 65536 tokens takes {steps['lemo, keep 0.5, layers recomputed']} on an" in text
    assert f"or {planned} if free memory is used" in text
    assert fastest == "Liger kernels, selective checkpointing"
    assert f"Liger with selective checkpointing, takes {steps[fastest]}" in text


def record(bench, keep, ours, peer_value, unit, **more):
    shape = {"model": "m", "context": 8192, "batch": 1, "steps": 8, "lora_rank": 16, "keep": keep}
    return {
        "bench": bench,
        "shape": shape | {"dense_layers": []},
        "ours": ours,
        "peer_value": peer_value,
        "ratio": ours / peer_value,
        "unit": unit,
        "cpu": "C",
        "threads": 2,
        "dtype": "model",
        "torch": "2.13.0",
        "commit": "abc",
        "date": "2026-01-01",
        **more,
    }


def test_table_shows_the_latest_measurement_of_each_keep(tmp_path):
    results = tmp_path / "cpu.jsonl"
    records = [
        record("other.bench", 0.5, 1.0, 1.0, "s"),
        record("main_job.step", 0.5, 9.0, 12.0, "s"),
        record("main_job.step", 0.5, 6.0, 12.0, "s"),
        record("main_job.step", 1.0, 13.2, 12.0, "s"),
        record("main_job.memory", 0.5, 2**29, 2**30, "bytes"),
        record("main_job.memory", 1.0, 2**30, 2**30, "bytes"),
        record("main_job.perplexity.book.tail", 0.5, 30.3, 30.0, "perplexity", before=99.0),
        record("main_job.perplexity.book.tail", 1.0, 30.0, 30.0, "perplexity", before=99.0),
    ]
    results.write_text("".join(json.dumps(r) + "\n" for r in records))
    rows = [line.split(" | ") for line in readme_table.main_job_table(results).splitlines()]
    table = {row[0].removeprefix("| "): row[1:] for row in rows if len(row) == 5}
    assert table["seconds a step"] == ["", "12.00", "6.00 (0.50x)", "13.20 (1.10x) |"]
    assert table["memory above the weights, MiB"][1:3] == ["1024", "512 (0.50x)"]
    assert table["perplexity, book, last quarter"][:3] == ["99.00", "30.00", "30.30 (1.010x)"]


def test_gpu_table_shows_each_method_of_the_latest_commit_of_a_length_once(tmp_path):
    def step(tokens, keep, ours, peer, peer_value, commit="b", **shape):
        shape = {"tokens": tokens, "keep": keep, "recompute": "layer"} | shape
        shape = {"scorer": "random", "block_size": 0.25} | shape
        common = {"shape": shape, "gpu": "NVIDIA G", "torch": "2", "commit": commit, "date": "d"}
        times = {"bench": "finetune step", "ours": ours, "peer": peer, "peer_value": peer_value}
        memory = {"bench": "finetune peak memory", "ours": 1, "peer": peer, "peer_value": 2}
        return [times | common, memory | common]

    records = [
        *step(64, 0.5, 9000.0, "liger", 9999.0, commit="a"),
        *step(64, 0.5, 1000.0, "liger", 4000.0),
        *step(64, 0.5, 1000.0, "s2", 3000.0),
        *step(32, 1.0, 2500.0, "liger", 2000.0, "a", recompute="none"),
        *step(128, 0.25, 500.0, None, None, block_size=64, scorer="predictor"),
    ]
    results = tmp_path / "gpu.jsonl"
    results.write_text("".join(json.dumps(r) + "\n" for r in records))
    table = readme_table.gpu_table(results)
    rows = [line for line in table.splitlines() if line[2:3].isdigit()]
    assert rows == [
        "| 32 | Liger kernels, checkpointing | 2.00 | 2.0 | d, a, G |",
        "| 32 | lemo: keep 1, nothing recomputed | 2.50 | 1.0 | d, a, G |",
        "| 64 | Liger kernels, checkpointing | 4.00 | 2.0 | d, b, G |",
        "| 64 | LongLoRA's S2-Attn, checkpointing | 3.00 | 2.0 | d, b, G |",
        "| 64 | lemo: keep 0.5, quarters drawn at random, layers recomputed | 1.00 | 1.0 "
        "| d, b, G |",
        "| 128 | lemo: keep 0.25, blocks of 64 tokens chosen by scorer predictor, "
        "layers recomputed | 0.50 | 1.0 | d, b, G |",
    ]


def test_table_without_results_says_so(tmp_path):
    assert "No fine-tuning step" in readme_table.gpu_table(tmp_path / "absent.jsonl")
    assert "not been recorded" in readme_table.main_job_table(tmp_path / "absent.jsonl")


def test_missing_marker_is_an_error():
    with pytest.raises(ValueError, match=r"README.md: expected the markers"):
        readme_table.replace_block("no markers", "block")


def test_files_and_commands_of_the_readme_exist():
    from lemo.cli.main import app

    (tree,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    for folder, inner in re.findall(r"^(\S+)/ .*\n((?:  .*\n)*)", tree, re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder
        for name in re.findall(r"^  (\S+)/ ", inner, re.MULTILINE):
            assert (ROOT / folder / name).is_dir(), name
    packages = {path.parent.name for path in (ROOT / "python/lemo").glob("*/__init__.py")}
    assert packages <= set(re.findall(r"^  (\S+)/ ", tree, re.MULTILINE))
    for name in re.findall(r"\]\(((?!http)[^)#]+)", README):
        assert (ROOT / name).exists(), name
    assert COMMANDS
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert {command for command, _ in COMMANDS} <= commands
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^make ([\w-]+)", SHELL, re.MULTILINE))
    assert named
    assert named | set(re.findall(r"`make ([\w-]+)", README)) <= targets


def test_options_of_the_readme_exist():
    from typer.testing import CliRunner

    from lemo.cli.main import app

    for command, rest in COMMANDS:
        text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in text, f"lemo {command} has no {option}"
