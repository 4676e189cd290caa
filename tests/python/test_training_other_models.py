"""Runs and evaluation of models that lemo has no code of its own for."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from generic_cases import make
from lemo import LemoConfig
from lemo.data.chat import Encoded
from lemo.settings.finetune import FinetuneConfig
from lemo.training.answers import answers_of
from lemo.training.evaluate import evaluate, load_for_evaluation, window_losses
from lemo.training.finetune import finetune
from lemo.training.run_log import read_log
from tiny import tiny_tokenizer, write_documents
from tolerances import assert_close_fp32

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.usefixtures("script_defaults"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

# With scaled logits, with capped ones, and with neither; a mixture of experts; learned biases.
NAMES = ("granite", "gemma2", "phi3", "mixtral", "gpt_neox")


@pytest.fixture(scope="module", params=NAMES)
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = make(request.param, vocab_size=257, bos_token_id=0, eos_token_id=None, pad_token_id=0)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def interrupt(record):
    if record["step"] == 3:
        raise KeyboardInterrupt


def test_a_run_goes_on_where_it_stopped_and_its_adapter_is_evaluated(model, tmp_path):
    write_documents(tmp_path / "documents.jsonl")
    config = FinetuneConfig(
        model=str(model),
        documents=str(tmp_path / "documents.jsonl"),
        output=str(tmp_path / "whole"),
        context_length=96,
        steps=4,
        warmup_steps=1,
        learning_rate=1e-2,
        device="cpu",
        elimination=LemoConfig(keep=0.5, block_size=16, scorer="random"),
    )
    finetune(config)
    cut = config.replace(output=str(tmp_path / "cut"), save_every=2)
    with pytest.raises(KeyboardInterrupt):
        finetune(cut, interrupt)
    finetune(cut.replace(resume=True))
    losses = [
        [row["loss"] for row in read_log(tmp_path / name / "log.jsonl")]
        for name in ("whole", "cut")
    ]
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 4

    arguments = str(model), tmp_path / "documents.jsonl", [96]
    before = evaluate(*arguments, device="cpu")
    after = evaluate(*arguments, adapter=tmp_path / "whole", device="cpu")
    loaded = load_for_evaluation(str(model), 96, adapter=tmp_path / "whole", device="cpu")
    assert [row["documents"] for row in after] == [row["documents"] for row in before]
    assert all(x["perplexity"] < y["perplexity"] for x, y in zip(after, before, strict=True))
    assert not loaded.training


def test_losses_and_answers_are_those_of_the_models_own_logits(model):
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    ids = torch.randint(1, 257, (50,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = loaded(input_ids=ids[None]).logits[0].double()
    oracle = cross_entropy(logits[:-1], ids[1:], reduction="none")
    assert_close_fp32(window_losses(loaded, ids), oracle)

    labels = torch.full_like(ids, -100)
    labels[20:25], labels[40:50] = ids[20:25], logits[39:49].argmax(-1)
    first, second = answers_of(loaded, Encoded(ids.tolist(), labels.tolist(), "example"))
    assert first.loss == pytest.approx(oracle[19:24].sum().item(), rel=1e-5)
    assert (first.tokens, first.exact, second.tokens, second.exact) == (5, False, 10, True)
