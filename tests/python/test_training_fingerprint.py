"""Inputs that changed, or that do not fit together, before a run goes on with other losses."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lemo
from lemo import LemoConfig
from lemo.predictors.model import embedding_digest
from lemo.predictors.storage import load as load_predictors
from lemo.preparation.documents import PrepareConfig, prepare_from_documents
from lemo.preparation.pipeline import prepare
from lemo.preparation.windows import Window
from lemo.settings.finetune import FinetuneConfig
from lemo.settings.preparation import PredictorSettings
from lemo.training import fingerprint
from lemo.training.evaluate import evaluate
from lemo.training.finetune import finetune
from lemo.training.run_log import read_log
from tiny import save_tiny_llama, write_documents

# Runs that are compared in fp32.
pytestmark = pytest.mark.cpu_only


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_llama(folder / "model")
    write_documents(folder / "documents.jsonl")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    windows = [Window("a", torch.arange(64)), Window("a", torch.arange(64, 128))]
    settings = PredictorSettings(block_size=16, search_rounds=0, steps=2)
    prepare(model, windows, windows, folder / "predictor", settings)
    return folder


@pytest.fixture
def config(inputs, tmp_path):
    for name in ("model", "predictor"):
        shutil.copytree(inputs / name, tmp_path / name)
    shutil.copy(inputs / "documents.jsonl", tmp_path)
    return FinetuneConfig(
        model=str(tmp_path / "model"),
        documents=str(tmp_path / "documents.jsonl"),
        output=str(tmp_path / "run"),
        context_length=64,
        steps=4,
        warmup_steps=0,
        lora_rank=2,
        save_every=2,
        elimination=LemoConfig(scorer="predictor", predictor=str(tmp_path / "predictor")),
    )


def change_json(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields, indent=1))


def change_config(folder: Path) -> None:
    change_json(folder / "model" / "config.json", rms_norm_eps=1e-3)


def change_weight(folder: Path) -> None:
    file = folder / "model" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, file, metadata={"format": "pt"})


def change_tokenizer(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.add_tokens(["the block"])
    tokenizer.save_pretrained(folder / "model")


def change_documents(folder: Path) -> None:
    write_documents(folder / "documents.jsonl", words=121)


def change_predictor(folder: Path) -> None:
    file = folder / "predictor" / "predictor.json"
    thresholds = json.loads(file.read_text())["thresholds"]
    thresholds["mlp"][0] += 1
    change_json(file, thresholds=thresholds, digest=None)


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_config, "resume: .*{} .* changed since: config.json of the model; put back"),
        (change_weight, "resume: .*{} .* changed since: weights of the model; put back"),
        (change_tokenizer, "resume: .*{} .* changed since: tokenizer; put back"),
        (change_predictor, "resume: .*{} .* changed since: predictor; put back"),
        (change_documents, "documents: expected the ones that .*{} was trained on, but "),
    ],
)
def test_resume_refuses_inputs_that_changed(config, tmp_path, change, message, done):
    if done:
        finetune(config)
    else:
        stop_after_step_2(config)
    change(tmp_path)
    with pytest.raises(ValueError, match="^" + message.format("step-4" if done else "step-2")):
        finetune(config.replace(resume=True))


def test_a_run_that_is_done_is_resumed_where_its_steps_do_not_fit(config, caplog):
    config = config.replace(device="cpu")
    finetune(config)
    caplog.set_level("INFO", "lemo")
    finetune(config.replace(resume=True, memory_limit=1e-6))
    assert "all 4 steps are done already" in caplog.text


def stop_after_step_2(config) -> None:
    def stop(record):
        if record["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(config, stop)


def test_resume_does_not_mind_how_the_same_inputs_are_written(config, tmp_path):
    expected = config.replace(output=config.output + "-whole")
    finetune(expected)
    stop_after_step_2(config)
    model = AutoModelForCausalLM.from_pretrained(config.model)
    (tmp_path / "model" / "model.safetensors").unlink()
    model.save_pretrained(config.model, max_shard_size="40KB")
    change_json(tmp_path / "model" / "config.json", transformers_version="5.0.0")
    change_json(tmp_path / "predictor" / "predictor.json", comment="mine")
    finetune(config.replace(resume=True))
    logs = [read_log(Path(run.output) / "log.jsonl") for run in (config, expected)]
    assert [r["loss"] for r in logs[0]] == [r["loss"] for r in logs[1]]


def test_a_checkpoint_without_fingerprints_is_resumed_with_a_warning(config, caplog):
    stop_after_step_2(config)
    state = Path(config.output) / "checkpoints" / "step-2" / "state.json"
    content = json.loads(state.read_text())
    del content["inputs"], content["sha256"]
    state.write_text(json.dumps(content | {"format": 1}))
    finetune(config.replace(resume=True))
    assert "step-2 was written by a lemo that took no fingerprints" in caplog.text


def test_fingerprints_of_large_tensors_read_a_part_of_each():
    model = torch.nn.Linear(1000, 1000, dtype=torch.bfloat16)
    before = fingerprint.of_weights(model)
    with torch.no_grad():
        model.weight[0, 1:16] += 1  # every 16th of a million values is read
    assert fingerprint.of_weights(model) == before
    with torch.no_grad():
        model.weight[-1] += 1
    assert fingerprint.of_weights(model) != before
    assert fingerprint.of_weights(model.float()) != before


def test_names_shapes_and_dtypes_are_in_the_fingerprint_beside_the_values():
    def digest(name="a", shape=(2, 6), dtype=torch.bfloat16, other="b"):
        module = torch.nn.Module()
        module.register_buffer(name, torch.zeros(shape, dtype=dtype))
        module.register_buffer(other, torch.ones(1))
        return fingerprint.of_weights(module)

    changed = {"name": "c"}, {"shape": (3, 4)}, {"dtype": torch.float16}, {"other": "c"}
    digests = [digest(), *(digest(**change) for change in changed)]
    assert len({*digests}) == len(digests)
    assert digest() == digests[0]


def test_the_order_in_which_tensors_are_registered_is_not_in_the_fingerprint():
    digests = set()
    for names in ("ab", "ba"):
        module = torch.nn.Module()
        for name in names:
            module.register_buffer(name, torch.full((3,), float(ord(name))))
        digests.add(fingerprint.of_weights(module))
    assert len(digests) == 1


def test_a_tokenizer_of_python_is_known_by_its_vocabulary_and_special_tokens():
    def digest(words, **special):
        tokenizer = SimpleNamespace(get_vocab=lambda: words, special_tokens_map=special)
        return fingerprint.of_tokenizer(tokenizer)

    known = digest({"a": 0, "b": 1}, eos_token="a")
    assert digest({"b": 1, "a": 0}, eos_token="a") == known
    assert digest({"a": 1, "b": 0}, eos_token="a") != known
    assert digest({"a": 0, "b": 1}, eos_token="b") != known


def test_fingerprints_of_tokenizers_do_not_depend_on_their_use(inputs):
    tokenizer = AutoTokenizer.from_pretrained(inputs / "model")
    before = fingerprint.of_tokenizer(tokenizer)
    tokenizer(["a b", "a"], padding="max_length", truncation=True, max_length=3)
    assert fingerprint.of_tokenizer(tokenizer) == before


@pytest.mark.parametrize("fields", [{"block_size": 0}, {"num_layers": True}, {"thresholds": []}])
def test_descriptions_of_predictors_are_checked(config, tmp_path, fields):
    change_json(tmp_path / "predictor" / "predictor.json", **fields)
    with pytest.raises(ValueError, match=f"predictor: .*field '{next(iter(fields))}': expected"):
        load_predictors(tmp_path / "predictor")


def adapted(model):
    lora = LoraConfig(target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


@pytest.mark.parametrize(
    ("change", "warnings"),
    [
        (lambda model: model, 0),
        (lambda model: model.bfloat16(), 0),
        (adapted, 0),
        (lambda model: type(model)(model.config), 1),  # other random weights
    ],
)
def test_predictors_of_another_model_of_this_shape_are_warned_of(inputs, caplog, change, warnings):
    torch.manual_seed(1)
    model = change(AutoModelForCausalLM.from_pretrained(inputs / "model"))
    predictor = str(inputs / "predictor")
    lemo.enable(model, LemoConfig(scorer="predictor", predictor=predictor))
    message = f"predictor: {predictor}: made for another model of this shape"
    assert caplog.text.count(message) == warnings


def test_predictors_of_earlier_versions_name_no_embedding(config, tmp_path, caplog):
    file = tmp_path / "predictor" / "predictor.json"
    model = json.loads(file.read_text())["model"]
    assert model.pop("embedding")
    change_json(file, model=model)
    finetune(config)
    assert "made for another model" not in caplog.text


def test_an_embedding_has_one_digest_in_all_dtypes():
    weight = torch.randn(300, 300) * torch.logspace(-9, 3, 300)
    # Stored in 16 bits, or in fp32 and rounded to bf16.
    for stored, dtypes in (
        (weight.bfloat16(), (torch.float32, torch.float16)),
        (weight.half(), (torch.float32, torch.bfloat16)),
        (weight, (torch.bfloat16,)),
    ):
        digest = embedding_digest(stored)
        assert [embedding_digest(stored.to(dtype)) for dtype in dtypes] == [digest] * len(dtypes)
    changed = weight.clone()
    changed[0, 290] *= 1.01
    assert embedding_digest(changed) != embedding_digest(weight)


@pytest.mark.parametrize("weight", [None, torch.ones(3, 2).byte(), torch.ones(3, 2).to("meta")])
def test_an_embedding_that_is_not_in_floats_has_no_digest(weight):
    assert embedding_digest(weight) is None


def test_thresholds_that_were_changed_are_noticed(config, tmp_path):
    file = tmp_path / "predictor" / "predictor.json"
    content = json.loads(file.read_text())
    content["thresholds"]["attention"][1] *= -1
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"predictor: .*json: .* thresholds are not those that we"):
        finetune(config)
    change_json(file, digest=None)  # as earlier folders have it
    load_predictors(tmp_path / "predictor")


def with_bos_beyond(folder: Path) -> None:
    """Its tokenizer puts a token in front of which the model knows nothing."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"] = [
        dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        | {"id": 257, "content": "<bos>", "special": True}
    ]
    special = {"<bos>": {"id": "<bos>", "ids": [257], "tokens": ["<bos>"]}}
    pieces = [
        {"SpecialToken": {"id": "<bos>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": pieces,
        "special_tokens": special,
    }
    file.write_text(json.dumps(content))


def test_every_command_compares_the_vocabulary_with_the_embedding(config, tmp_path):
    with_bos_beyond(tmp_path / "model")
    calls = (
        lambda: finetune(config),
        lambda: evaluate(config.model, config.documents, [32]),
        lambda: prepare_from_documents(
            PrepareConfig(
                model=config.model,
                documents=config.documents,
                output=str(tmp_path / "new"),
                lengths=(64,),
                block_size=16,
            )
        ),
    )
    for call in calls:
        with pytest.raises(
            ValueError, match="tokenizer: expected ids below 257, .* <bos>; the tok"
        ):
            call()
    assert not Path(config.output).exists()
    assert not (tmp_path / "new").exists()


def test_windows_that_are_given_are_compared_with_the_embedding(inputs, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(inputs / "model")
    windows = [Window("a", torch.arange(250, 314))]
    with pytest.raises(ValueError, match="training: expected ids from 0 to 256, .* 250 to 313"):
        prepare(model, windows, windows, tmp_path / "new", PredictorSettings(block_size=16))


def test_a_loss_that_is_no_number_is_no_perplexity(config, tmp_path):
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    # Numbers, whose products are none.
    weights["model.norm.weight"].fill_(3e38)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(FloatingPointError, match="loss of a window of 32 tokens .* is nan"):
        evaluate(config.model, config.documents, [32])
