"""Fine-tuning on conversations: losses of the answers alone, packed without leaks, resumable."""

import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from lemo import LemoConfig
from lemo.cli.main import main
from lemo.data import open_training_data
from lemo.relevance.store import ScoreStore, write_scores
from lemo.settings.finetune import FinetuneConfig
from lemo.training.finetune import finetune
from lemo.training.model import load_tokenizer
from lemo.training.run_log import read_log
from tiny import sample_text, save_tiny_llama

# Compared in fp32, which a GPU's attention does not know.
pytestmark = [pytest.mark.cpu_only, pytest.mark.usefixtures("script_defaults")]

CONTEXT = 160


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_llama(folder / "model", context=CONTEXT)
    draw = random.Random(0)
    with (folder / "pairs.jsonl").open("w") as file:
        for number in range(9):
            prompt = sample_text(draw.randrange(2, 12), number)
            pair = {"prompt": prompt, "completion": " " + sample_text(3, 100 + number)}
            file.write(json.dumps(pair) + "\n")
    return folder


def config(inputs, output, **settings):
    return FinetuneConfig(
        model=str(inputs / "model"),
        documents=str(inputs / "pairs.jsonl"),
        output=str(output),
        context_length=CONTEXT,
        **{"steps": 3, "batch_size": 2, "lora_rank": 4, "warmup_steps": 0} | settings,
    )


def losses(folder):
    return [record["loss"] for record in read_log(folder / "log.jsonl")]


@pytest.mark.parametrize("elimination", [None, LemoConfig(keep=1.0, block_size=16)])
def test_the_first_loss_is_that_of_every_example_alone(inputs, tmp_path, elimination):
    run = config(inputs, tmp_path / "run", gradient_accumulation=2, elimination=elimination)
    finetune(run)
    tokenizer = load_tokenizer(run.model)
    windows = open_training_data(run.documents, tokenizer, CONTEXT, run.seed)
    assert windows.packed
    model = AutoModelForCausalLM.from_pretrained(run.model)
    total, count = 0.0, 0
    for window in (windows.window(index) for index in range(4)):
        parts = (part.split(list(window.seqlens)) for part in (window.ids, window.labels))
        for ids, labels in zip(*parts):
            number = int((labels[1:] != -100).sum())
            with torch.no_grad():
                loss = model(input_ids=ids[None], labels=labels[None]).loss
            total, count = total + loss.item() * number, count + number
    first = read_log(tmp_path / "run" / "log.jsonl")[0]
    assert first["loss"] == pytest.approx(total / count, rel=1e-5)
    assert first["tokens"] == sum(windows.window(index).ids.numel() for index in range(4))


def test_answers_are_learned_and_a_resumed_run_goes_on(inputs, tmp_path):
    settings = {"steps": 8, "learning_rate": 2e-2, "save_every": 4}
    whole = config(inputs, tmp_path / "whole", elimination=LemoConfig(block_size=16), **settings)
    finetune(whole)
    assert losses(tmp_path / "whole")[-1] < losses(tmp_path / "whole")[0] - 0.1
    stopped = whole.replace(output=str(tmp_path / "stopped"))

    class StopError(Exception):
        pass

    def stop(record):
        if record["step"] == 6:
            raise StopError

    with pytest.raises(StopError):
        finetune(stopped, stop)
    finetune(stopped.replace(resume=True))
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    # What the settings leave open follows the data; the run says what it was.
    for name in ("whole", "stopped"):
        resolved = json.loads((tmp_path / name / "elimination.json").read_text())
        assert LemoConfig.from_dict(resolved) == whole.elimination.resolved(answers=True)
    with pytest.raises(ValueError, match="labels was 'answers', now 'all'"):
        finetune(stopped.replace(resume=True, labels="all"))


@pytest.mark.parametrize(("long", "answers"), [(0, False), (1, True)])
def test_what_is_kept_follows_the_labels_of_all_examples(inputs, tmp_path, caplog, long, answers):
    """As of batches in Python: short prompts with long answers are text."""
    caplog.set_level("INFO", "lemo")
    lengths = [(2, 12)] * 4 + [(20, 2)] * (4 * long)
    texts = [[sample_text(words, number) for words in pair] for number, pair in enumerate(lengths)]
    rows = [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in texts]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    run = config(inputs, tmp_path / "run", elimination=LemoConfig())
    finetune(run.replace(documents=str(tmp_path / "rows.jsonl")))
    resolved = LemoConfig.from_dict(json.loads((tmp_path / "run" / "elimination.json").read_text()))
    assert resolved == LemoConfig().resolved(answers=answers)
    others = "4 of 8 examples have labels on more than half of their tokens"
    assert (others in caplog.text) == answers
    kept = "blocks of 64 tokens, at least 1024 tokens of each prompt, scorer lexical"
    assert (kept in caplog.text) == answers


def test_labels_on_everything(inputs, tmp_path):
    finetune(config(inputs, tmp_path / "a", steps=1, elimination=None))
    finetune(config(inputs, tmp_path / "b", steps=1, elimination=None, labels="all"))
    assert losses(tmp_path / "a") != losses(tmp_path / "b")


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return exit_.value.code, captured.out, captured.err


def test_data_check(inputs, tmp_path, capsys):
    command = ["data", "check", inputs / "pairs.jsonl", "--model", inputs / "model"]
    code, out, err = run(capsys, *command, "--context-length", 40, "--example", 1)
    assert code == 0
    # This tokenizer has no end token.
    assert err.startswith("warning: ")
    assert err.endswith("the model will not learn where they end\n")
    assert "conversations" in out
    assert "tokens with a label" in out
    assert "the middle of the prompt is cut out of" in out
    second = json.loads((inputs / "pairs.jsonl").read_text().splitlines()[1])
    shown = out.rpartition("labels between {+ and +}:")[2]
    assert second["prompt"] + "{+" + second["completion"] in shown.replace("\n", "")
    code, _, err = run(capsys, *command, "--example", 9)
    assert code == 1
    assert "example: expected a number from 0 to 8, got 9" in err
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "p", "completion": "c"}\n{"question": "q", "answer": "a"}\n')
    code, out, err = run(capsys, "data", "check", bad, "--model", inputs / "model")
    assert (code, out) == (1, "")
    assert "bad.jsonl:2: expected 'messages'" in err
    assert "got the keys question, answer" in err


def test_copies_are_told_of(inputs, tmp_path, capsys):
    """By `lemo data check` and `lemo eval`, of examples and of documents; each counts."""
    rows = (inputs / "pairs.jsonl").read_text().splitlines()
    (tmp_path / "pairs.jsonl").write_text("\n".join([*rows, rows[0], rows[1], rows[0]]))
    (tmp_path / "once.jsonl").write_text("\n".join(rows))
    texts = [json.dumps({"id": i, "text": f"{word} " * 40}) for i, word in enumerate("abbcb")]
    (tmp_path / "texts.jsonl").write_text("\n".join(texts))
    model = "--model", inputs / "model"
    long = "--context-length", 512
    _, out, _ = run(capsys, "data", "check", tmp_path / "pairs.jsonl", *model, *long)
    assert "3 of 12 examples are copies of others" in out
    _, out, _ = run(capsys, "data", "check", tmp_path / "once.jsonl", *model, *long)
    assert "copies" not in out
    _, out, _ = run(capsys, "data", "check", tmp_path / "texts.jsonl", *model, *long)
    assert "2 of 5 documents are copies of others" in out
    evaluated = "eval", *model, "--device", "cpu", "--documents"
    _, _, err = run(capsys, *evaluated, tmp_path / "pairs.jsonl", "--lengths", 64)
    assert "3 of 12 examples are copies of others" in err
    _, _, err = run(capsys, *evaluated, tmp_path / "texts.jsonl", "--lengths", 32)
    assert "2 of 5 windows of 32 tokens are copies of others" in err


def test_data_check_of_documents(inputs, tmp_path, capsys):
    (tmp_path / "d.txt").write_text("one two " * 40)
    code, out, err = run(
        capsys,
        "data",
        "check",
        tmp_path / "d.txt",
        "--model",
        inputs / "model",
        "--context-length",
        400,
    )
    assert (code, err) == (0, "")
    assert "1 of 1 documents are shorter than 400 tokens" in out
    assert "{+" + "one two " * 40 + "+}" in out.replace("\n", "")


def test_data_check_of_long_and_of_empty_documents(inputs, tmp_path, capsys):
    (tmp_path / "long.txt").write_text("begin " + "x" * 5000 + " end")
    (tmp_path / "empty.txt").write_text("")
    command = "data", "check", tmp_path / "long.txt", "--model", inputs / "model"
    code, out, _ = run(capsys, *command)
    assert code == 0
    assert "{+begin x" in out
    assert "[... 4210 characters ...]" in out
    assert "x end+}" in out
    code, out, err = run(capsys, "data", "check", tmp_path / "empty.txt", *command[3:])
    assert (code, err) == (0, "")
    assert "0 (0.0%)" in out
    code, _, err = run(capsys, *command, "--context-length", 1)
    assert code == 1
    assert "--context-length: expected an integer in [2, 2147483647], got 1" in err


def test_scores_of_blocks_longer_than_memory(inputs, tmp_path):
    """A token has the score of its block; nothing is made of the length of a block."""
    tokenizer = load_tokenizer(str(inputs / "model"))
    path = inputs / "pairs.jsonl"
    windows = open_training_data(path, tokenizer, CONTEXT)
    write_scores(tmp_path / "s", windows.examples, lambda example: [0.5], block_size=10**12)
    scored = open_training_data(path, tokenizer, CONTEXT, scores=ScoreStore.read(tmp_path / "s"))
    window = scored.window(0)
    assert window.scores.shape == window.ids.shape
    assert set(window.scores.tolist()) == {0.5}
