"""Exact answers: compared with Transformers' own logits; what counts, what is cut, and errors."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from lemo.cli.main import main
from lemo.data import Document
from lemo.data.chat import Encoded
from lemo.training.answers import answers_of, evaluate_answers, has_answers
from lemo.training.evaluate import evaluate
from lemo.training.model import load_tokenizer
from tiny import sample_text, save_tiny_llama, write_documents

pytestmark = pytest.mark.cpu_only

CONTEXT = 160


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model, and prompts of which every second one has the completion that the model gives."""
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_llama(folder / "model", context=CONTEXT)
    tokenizer = load_tokenizer(str(folder / "model"))
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    said = []
    for number in range(1000):
        prompt = sample_text(8, number)
        with torch.no_grad():
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            answer = tokenizer.decode(model(ids).logits[0, -1].argmax())
        # One that the tokenizer reads back as the same token.
        if answer.isascii() and answer.isprintable() and len(answer) == 1:
            said.append({"prompt": prompt, "completion": answer})
    others = [
        {"prompt": sample_text(8, 2000 + number), "completion": " " + sample_text(2, number)}
        for number in range(3)
    ]
    pairs = [pair for both in zip(others, said, strict=False) for pair in both]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "long.jsonl").write_text(json.dumps(others[0]) + "\n")
    return folder


def oracle(model, example):
    """Answers by the model's full logits: (tokens, right, loss) of each run of labels."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([example.ids])).logits[0].log_softmax(-1)
    found, open_run = [], None
    for place, label in enumerate(example.labels):
        if place == 0 or label == -100:
            open_run = None
            continue
        if open_run is None:
            open_run = [0, 0, 0.0]
            found.append(open_run)
        open_run[0] += 1
        open_run[1] += int(logits[place - 1].argmax()) == label
        open_run[2] -= logits[place - 1, label].item()
    return found


def test_answers_are_runs_of_labels_by_the_full_logits(inputs):
    model = AutoModelForCausalLM.from_pretrained(inputs / "model").eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 257, (40,), generator=generator)
    with torch.no_grad():
        # Some tokens that the model itself would say.
        ids[21] = model(input_ids=ids[None, :21]).logits[0, -1].argmax()
    labels = torch.full_like(ids, -100)
    for answered in (slice(0, 2), slice(9, 12), slice(21, 22), slice(38, 40)):
        labels[answered] = ids[answered]
    example = Encoded(ids.tolist(), labels.tolist(), "example")
    found = answers_of(model, example)
    expected = oracle(model, example)
    assert [answer.tokens for answer in found] == [1, 3, 1, 2]
    assert [[a.tokens, a.right] for a in found] == [run[:2] for run in expected]
    assert [answer.loss for answer in found] == pytest.approx([run[2] for run in expected], 1e-5)
    assert [answer.exact for answer in found] == [run[0] == run[1] for run in expected]
    assert found[2].exact
    assert not found[1].exact
    assert answers_of(model, Encoded([1, 2], [-100, -100], "none")) == []


def test_a_length_that_no_example_has_is_no_window_beyond_the_context(inputs, caplog):
    evaluate_answers(str(inputs / "model"), inputs / "pairs.jsonl", [2**20], device="cpu")
    assert "context" not in caplog.text


@pytest.mark.parametrize(("scaling", "warned"), [("none", True), ("linear", False)])
def test_windows_beyond_the_context_are_named(inputs, caplog, scaling, warned):
    documents = [Document("a", "text", "one word and another " * CONTEXT)]
    lengths = [CONTEXT, CONTEXT + 1]
    evaluate(str(inputs / "model"), documents, lengths, rope_scaling=scaling, device="cpu")
    message = f"windows of up to {CONTEXT + 1} tokens are longer than the model's context of 160;"
    assert (message in caplog.text) == warned


def test_summary_of_a_file(inputs):
    done = []
    model = str(inputs / "model")
    rows = evaluate_answers(
        model,
        inputs / "pairs.jsonl",
        [40, CONTEXT],
        device="cpu",
        progress=lambda *at: done.append(at),
    )
    assert [(row["kind"], row["length"]) for row in rows] == [("answers", 40), ("answers", CONTEXT)]
    assert done[-1] == (12, 12)
    whole = rows[1]
    assert (whole["documents"], whole["answers"]) == (6, 6)
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer = load_tokenizer(model)
    runs = []
    for line in (inputs / "pairs.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        labels = [-100] * len(prompt) + ids[len(prompt) :]
        runs += oracle(loaded, Encoded(ids, labels, "x"))
    tokens = sum(run[0] for run in runs)
    assert whole["exact"] == sum(run[0] == run[1] for run in runs) / 6
    assert whole["right_tokens"] == sum(run[1] for run in runs) / tokens
    perplexity = math.exp(sum(run[2] for run in runs) / tokens)
    assert whole["perplexity"] == pytest.approx(perplexity, rel=1e-5)
    # The same with a model; the limit takes the first ones.
    (limited,) = evaluate_answers(
        loaded, inputs / "pairs.jsonl", [CONTEXT], tokenizer=tokenizer, limit=2
    )
    assert limited["exact"] == sum(run[0] == run[1] for run in runs[:2]) / 2


def test_what_does_not_fit_is_told(inputs, tmp_path, caplog):
    caplog.set_level("INFO", logger="lemo")
    pairs = [
        {"prompt": "p" * prompt, "completion": "c" * answer}
        for prompt, answer in ((10, 4), (60, 4), (4, 60))
    ]
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    [row] = evaluate_answers(str(inputs / "model"), file, [40], device="cpu")
    assert row["documents"] == 2
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if "examples" in line] == [
        "the middle of the prompt is cut out of 1 of 3 examples, 24 tokens in all, so that they "
        "fit into 40",
        "1 of 3 examples are left out, because their answers are too long or none has a label: "
        "d.jsonl:3",
    ]


def test_bad_arguments(inputs):
    pairs, model = inputs / "pairs.jsonl", str(inputs / "model")
    with pytest.raises(ValueError, match="lengths: expected at least one"):
        evaluate_answers(model, pairs, [])
    with pytest.raises(ValueError, match=r"limit: expected an integer in \[1, 2147483647\], got 0"):
        evaluate_answers(model, pairs, [40], limit=0)
    with pytest.raises(ValueError, match="an example with answers of fewer than 2 tokens"):
        evaluate_answers(model, pairs.with_name("long.jsonl"), [2])
    for lengths, limit, name in (([1], None, "lengths"), ([8, 10**12], 2, "lengths")):
        with pytest.raises(ValueError, match=f"^{name}: expected an integer in"):
            evaluate_answers(model, pairs, lengths, limit=limit)
    with pytest.raises(ValueError, match="^limit: expected an integer in"):
        evaluate(model, inputs / "documents.jsonl", [8], limit=10**24)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    with pytest.raises(ValueError, match="tokenizer: expected the model's"):
        evaluate_answers(loaded, pairs, [40])


def test_a_loss_that_is_no_number_is_refused(inputs):
    loaded = AutoModelForCausalLM.from_pretrained(inputs / "model").eval()
    with torch.no_grad():
        loaded.lm_head.weight[0] = math.nan
    tokenizer = load_tokenizer(str(inputs / "model"))
    with pytest.raises(FloatingPointError, match="loss of answers in 40 tokens is nan"):
        evaluate_answers(loaded, inputs / "pairs.jsonl", [40], tokenizer=tokenizer)


def test_a_window_whose_loss_is_no_number_in_some_place_is_refused(inputs, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(inputs / "model").eval()
    tokenizer = load_tokenizer(str(inputs / "model"))
    losses = torch.ones(15).index_fill(0, torch.tensor([9]), math.nan)
    monkeypatch.setattr("lemo.training.evaluate.window_losses", lambda model, ids: losses)
    document = Document("a", "book", "some words of a book, more of them")
    with pytest.raises(FloatingPointError, match=r"a window of 16 tokens \(kind 'book'\) is nan"):
        evaluate(model, [document], [16], tokenizer=tokenizer)


def test_command(inputs, tmp_path, capsys):
    assert has_answers(inputs / "pairs.jsonl")
    assert not has_answers(write_documents(tmp_path / "documents.jsonl"))
    command = ["eval", "--model", inputs / "model", "--documents", inputs / "pairs.jsonl"]
    arguments = [*command, "--lengths", CONTEXT, "--device", "cpu", "--json", tmp_path / "out.json"]
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr().out
    assert not exit_.value.code
    (row,) = json.loads((tmp_path / "out.json").read_text())
    assert f"{row['exact']:.1%}" in printed
    assert f"{row['perplexity']:.3f}" in printed
    assert row["exact"] == 0.5


def test_modules_of_a_given_model_are_in_their_modes_afterwards(inputs, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(inputs / "model").train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    tokenizer = load_tokenizer(str(inputs / "model"))
    texts = write_documents(tmp_path / "texts.jsonl", 1)
    evaluate_answers(model, inputs / "pairs.jsonl", [96], tokenizer=tokenizer)
    evaluate(model, texts, [48], tokenizer=tokenizer)
    assert [module.training for module in model.modules()] == before
