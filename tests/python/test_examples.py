"""The scripts in examples/ run as they are and leave an adapter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tiny import sample_text, save_tiny_llama, tiny_tokenizer, write_documents

pytestmark = pytest.mark.cpu_only

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(folder, name, data, *options):
    model = save_tiny_llama(folder / "model", context=256)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "<s>"  # TRL ends completions with it
    tokenizer.save_pretrained(model)
    command = [sys.executable, EXAMPLES / name, model, data, folder / "adapter"]
    command += ["--tokens", "128", "--steps", "2", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model), folder / "adapter"
    )
    trained = [p for name, p in adapted.named_parameters() if "lora_B" in name]
    assert trained
    assert all(p.any() for p in trained)
    return done.stdout


def test_own_loop(tmp_path):
    output = run(tmp_path, "own_loop.py", write_documents(tmp_path / "texts.jsonl"))
    assert "64 of 128 tokens" in output


def test_trainer(tmp_path):
    output = run(tmp_path, "trainer.py", write_documents(tmp_path / "texts.jsonl"), "--cpu")
    assert "loss" in output


def test_sft(tmp_path):
    rows = [
        {"prompt": sample_text(15, seed), "completion": " " + sample_text(3, seed + 100)}
        for seed in range(4)
    ]
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert "loss" in run(tmp_path, "sft.py", answers, "--cpu")
