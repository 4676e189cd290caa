"""Runs with a quantised base: from the setting to the adapter and its evaluation."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TorchAoConfig,
)

import lemo
from lemo import LemoConfig
from lemo.planner.plan import NOMINAL
from lemo.planner.shape import layer_bytes, shape_of, weight_bytes
from lemo.settings.finetune import FinetuneConfig
from lemo.training import quantised
from lemo.training.evaluate import load_for_evaluation
from lemo.training.finetune import finetune
from lemo.training.model import load_config, load_model
from lemo.training.planning import out_of_memory, request_of
from lemo.training.run_log import read_log
from tiny import save_tiny_llama, write_documents
from tolerances import assert_close_fp32, relative_error

pytestmark = [pytest.mark.cpu_only, pytest.mark.usefixtures("script_defaults")]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    # Where the CPU multiplies by packed weights, bitsandbytes knows no rows of less than 64.
    save_tiny_llama(folder / "model", width=64)
    write_documents(folder / "documents.jsonl")
    return folder


def config_of(inputs, output, **more):
    return FinetuneConfig(
        model=str(inputs / "model"),
        documents=str(inputs / "documents.jsonl"),
        output=str(output),
        context_length=96,
        save_every=2,
        **{"steps": 4, "quantize": "nf4", "elimination": LemoConfig(block_size=16), **more},
    )


def losses(folder):
    return [record["loss"] for record in read_log(Path(folder) / "log.jsonl")]


def kinds(model):
    return {type(module).__name__ for module in model.modules()}


def test_a_run_stops_resumes_and_is_evaluated_as_it_was_trained(inputs, tmp_path, caplog):
    pytest.importorskip("bitsandbytes")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finetune(config_of(inputs, whole))
    finetune(config_of(inputs, parts, steps=2, lr_schedule="constant"))
    assert len(losses(whole)) == 4
    with pytest.raises(ValueError, match="quantize was 'nf4', now 'int8'"):
        finetune(
            config_of(inputs, parts, steps=2, lr_schedule="constant", quantize="int8", resume=True)
        )
    described = json.loads((whole / "adapter" / "model_config.json").read_text())
    assert "quantization_config" not in described, "the model's own folder is not quantised"
    with caplog.at_level("INFO", "lemo"):
        model = load_for_evaluation(str(inputs / "model"), 64, adapter=whole)
    assert "quantised as it was for the adapter's training: nf4" in caplog.text
    assert {"Linear4bit", "LlamaModel"} <= kinds(model)
    ids = torch.arange(60)[None]
    assert model(input_ids=ids).logits.isfinite().all()


def test_an_interrupted_run_goes_on_to_the_same_losses(inputs, tmp_path):
    pytest.importorskip("bitsandbytes")
    whole, parts = config_of(inputs, tmp_path / "whole"), config_of(inputs, tmp_path / "parts")
    finetune(whole)

    class StoppedError(Exception):
        pass

    def stop(record, *rest):
        if record["step"] == 3:
            raise StoppedError

    with pytest.raises(StoppedError):
        finetune(parts, stop)
    finetune(parts.replace(resume=True))
    assert losses(parts.output) == losses(whole.output)


def test_a_model_that_is_stored_quantised_stays_as_it_is(inputs, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = load_config(str(inputs / "model"))
    model = load_model(str(inputs / "model"), config, torch.float32, "nf4")
    assert quantised.is_quantised(model.config)
    model.save_pretrained(tmp_path / "stored")
    for file in (inputs / "model").glob("tokenizer*"):
        (tmp_path / "stored" / file.name).write_bytes(file.read_bytes())
    again = load_config(str(tmp_path / "stored"))
    assert "Linear4bit" in kinds(load_model(str(tmp_path / "stored"), again, torch.float32))
    with pytest.raises(ValueError, match=r"quantize: expected null, .* already \(bitsandbytes\)"):
        load_model(str(tmp_path / "stored"), again, torch.float32, "int8")
    run = config_of(tmp_path, tmp_path / "run", quantize=None, steps=2)
    run = run.replace(model=str(tmp_path / "stored"), documents=str(inputs / "documents.jsonl"))
    finetune(run)
    assert len(losses(run.output)) == 2


def stored(inputs, folder, how, dtype):
    """A folder with the model as Transformers stores it, which it quantised out of `dtype`."""
    model = AutoModelForCausalLM.from_pretrained(
        inputs / "model", dtype=dtype, quantization_config=how, device_map={"": "cpu"}
    )
    model.save_pretrained(folder)
    for file in (inputs / "model").glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def ways_to_store():
    """By name: what Transformers quantises by."""
    torchao = pytest.importorskip("torchao.quantization")
    pytest.importorskip("bitsandbytes")
    return {
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "torchao float8": TorchAoConfig(torchao.Float8WeightOnlyConfig()),
        "torchao int8": TorchAoConfig(torchao.Int8WeightOnlyConfig()),
        "torchao int4": TorchAoConfig(
            torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(32))
        ),
    }


STORED = ["nf4", "int8", "torchao float8", "torchao int8", "torchao int4"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", STORED)
def test_a_stored_model_computes_in_the_dtype_that_is_asked_for(inputs, tmp_path, how):
    """Transformers leaves it, or a part of it, in the dtype that it was stored in."""
    dtypes = torch.bfloat16, torch.float32
    ids = torch.arange(60)[None]
    for was, wanted in (dtypes, dtypes[::-1]):
        folder = stored(inputs, tmp_path / str(was), ways_to_store()[how], was)
        config = load_config(str(folder))
        # In evaluation bitsandbytes packs 4 bits in another way on some CPUs.
        model = load_model(str(folder), config, wanted).train()
        assert model.get_input_embeddings().weight.dtype == wanted
        assert model.model.norm.weight.dtype == wanted
        logits = model(input_ids=ids).logits
        assert logits.dtype == wanted
        # The values in few bits are those that were stored.
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=was, device_map={"": "cpu"})
        again.train()
        assert again.model.norm.weight.dtype == was
        bound = 8 * torch.finfo(torch.bfloat16).eps
        assert relative_error(logits, again(input_ids=ids).logits) < bound
        handle = lemo.enable(get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")))
        others = {*handle.general_modules().values()}
        assert len(others) == (1 if how == "int8" else 0), others


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", STORED)
def test_an_adapter_is_evaluated_over_weights_that_are_stored_in_another_way(inputs, tmp_path, how):
    folder = stored(inputs, tmp_path / "stored", ways_to_store()[how], torch.float32)
    plain, ids = str(inputs / "model"), torch.arange(60)[None]
    settings = {"learning_rate": 0.02, "steps": 2, "lr_schedule": "constant"}
    over_stored = config_of(inputs, tmp_path / "a", quantize=None, **settings)
    over_stored = over_stored.replace(model=str(folder))
    # Trained on one, in float8 on the other.
    over_plain = config_of(inputs, tmp_path / "b", quantize="float8", **settings)
    for run, model in ((over_stored, plain), (over_plain, str(folder))):
        finetune(run)
        mine = load_for_evaluation(model, 64, adapter=run.output)
        base = AutoModelForCausalLM.from_pretrained(model, device_map={"": "cpu"})
        # Windows of 96 tokens, 64 of the model's.
        base.config.rope_parameters |= {"rope_type": "linear", "factor": 1.5}
        base.model.rotary_emb = type(base.model.rotary_emb)(base.config)
        expected = PeftModel.from_pretrained(base, f"{run.output}/adapter")
        with torch.no_grad():
            assert_close_fp32(mine(input_ids=ids).logits, expected(input_ids=ids).logits)
            base_alone = expected.unload()(input_ids=ids).logits
            assert relative_error(mine(input_ids=ids).logits, base_alone) > 0.1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", STORED)
def test_a_plan_counts_weights_as_they_are_stored(inputs, tmp_path, how):
    folder = stored(inputs, tmp_path / "stored", ways_to_store()[how], torch.float32)
    run, model_config = config_of(folder, tmp_path, quantize=None), load_config(str(folder))
    run = run.replace(model=str(folder))
    asked = (
        run.elimination.resolved(False),
        model_config,
        torch.float32,
        torch.device("cpu"),
        NOMINAL,
    )
    request = request_of(run, *asked)
    shape = request.shape
    predicted = request.planner(96).weights - 12 * request.adapters.parameters(shape)
    size = (folder / "model.safetensors").stat().st_size
    # The header of a small file, and scales of short rows.
    assert 0.85 * size < predicted < size
    assert shape.scales == {"nf4": 4 / 64, "torchao int4": (4 + 1) / 32}.get(how, 0)
    with pytest.raises(ValueError, match="quantize: expected null, because .* already"):
        request_of(run.replace(quantize="nf4"), *asked)
    fp8 = run.replace(elimination=run.elimination.replace(products="fp8"))
    if how != "torchao float8":
        with pytest.raises(ValueError, match=r"elimination\.products: expected dtype over weights"):
            request_of(fp8, fp8.elimination.resolved(False), *asked[1:])


def tensors_of(weight):
    """What a weight consists of that grows with it."""
    state = getattr(weight, "quant_state", None)
    if state is not None:
        nested = getattr(state.state2, "absmax", None)
        return [weight.data, state.absmax, *([] if nested is None else [nested])]
    if hasattr(weight, "__tensor_flatten__"):
        return [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
    return [weight]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("how", [*STORED, "nf4 nested", "torchao int8 in groups"])
def test_scales_are_counted_as_a_model_has_them(tmp_path, how, dtype):
    torchao = pytest.importorskip("torchao.quantization")
    groups = torchao.Int8WeightOnlyConfig(granularity=torchao.PerGroup(64))
    ways = ways_to_store() | {
        "nf4 nested": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
        "torchao int8 in groups": TorchAoConfig(groups),
    }
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    plain = LlamaForCausalLM(LlamaConfig(**sizes, **heads, vocab_size=64))
    plain.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=dtype, quantization_config=ways[how], device_map={"": "cpu"}
    )
    linears = [m for m in model.model.layers.modules() if hasattr(m, "in_features")]
    assert len(linears) == 7
    stored = sum(part.nbytes for m in linears for part in tensors_of(m.weight))
    config = model.config
    shape = replace(shape_of(config), scales=quantised.scale_bytes(config, dtype.itemsize))
    predicted = layer_bytes(shape, dtype.itemsize, quantised.stored_as(config))
    # Scales of rows are not counted: up to five bytes for 512 numbers.
    of_rows = how in ("torchao float8", "torchao int8")
    assert predicted == pytest.approx(stored, rel=0.01 if of_rows else 1e-3)


# What a configuration leaves out, as Transformers reads it: names of modules or of parameters.
SKIPS = {
    "by name": ["q_proj", "gate_proj"],
    "a layer": ["model.layers.0", "lm_head"],
    "a part of a layer": ["model.layers.1.mlp"],
    "a pattern": [r".*\.layers\.1\..*_proj", "down_proj.weight"],
    "the head": ["lm_head"],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("skips", SKIPS)
@pytest.mark.parametrize("how", ["nf4", "int8", "torchao float8"])
def test_layers_that_are_left_as_they_are_are_counted_so(tmp_path, how, skips):
    settings = ways_to_store()[how]
    name = "modules_to_not_convert" if "torchao" in how else "llm_int8_skip_modules"
    setattr(settings, name, SKIPS[skips])
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, vocab_size=64))
    model.save_pretrained(tmp_path / "model")
    dtype = torch.bfloat16
    folder = str(stored(tmp_path, tmp_path / "stored", settings, dtype))
    config = load_config(folder)
    loaded = load_model(folder, config, dtype)
    layers = [
        sum(
            part.nbytes
            for module in layer.modules()
            if hasattr(module, "in_features")
            for part in tensors_of(module.weight)
        )
        for layer in loaded.model.layers
    ]
    run = FinetuneConfig(model="m", documents="d", output="o", context_length=96)
    elimination = run.elimination.resolved(False)
    shape = request_of(run, elimination, config, dtype, torch.device("cpu"), NOMINAL).shape
    way = quantised.stored_as(config)
    # Scales of rows are not counted.
    others = 2 * shape.parameters()[1]
    assert weight_bytes(shape, 2, way) - others == pytest.approx(sum(layers), rel=0.05)
    assert layer_bytes(shape, 2, way) == pytest.approx(max(layers), rel=0.05)


@pytest.mark.parametrize("quantize", [None, "float8"])
def test_who_runs_out_of_memory_is_not_told_to_quantise_twice(inputs, tmp_path, quantize):
    run = config_of(inputs, tmp_path, quantize=quantize)
    said = str(out_of_memory(1, MemoryError("none left"), run, None, 0))
    assert ("--quantize nf4" in said) == (quantize is None)


def test_weights_whose_memory_is_not_known_are_not_planned(inputs, tmp_path):
    config = load_config(str(inputs / "model"))
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    run = config_of(inputs, tmp_path, quantize=None)
    asked = run.elimination.resolved(False), config, torch.float32, torch.device("cpu"), NOMINAL
    with pytest.raises(ValueError, match="model: expected weights that are plain, .* got gptq"):
        request_of(run, *asked)


@pytest.mark.parametrize(("name", "package"), [("nf4", "bitsandbytes"), ("float8", "torchao")])
def test_a_package_that_is_missing_is_named(monkeypatch, name, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(quantised, "find_spec", lambda n: None if n == package else find(n))
    with pytest.raises(ModuleNotFoundError, match=f"quantize: '{name}' needs .*pip install"):
        quantised.quantization_config(name, torch.bfloat16)


def test_other_names_are_refused(inputs, tmp_path):
    with pytest.raises(ValueError, match="quantize: expected one of nf4, int8, float8, got 'int3'"):
        quantised.quantization_config("int3", torch.bfloat16)
    with pytest.raises(ValueError, match="quantize"):
        config_of(inputs, tmp_path, quantize="int3")


def test_packed_weights_that_are_called_floats_are_not_taken_for_numbers(inputs, tmp_path):
    pytest.importorskip("bitsandbytes")
    model, config = str(inputs / "model"), load_config(str(inputs / "model"))
    how = quantised.quantization_config("nf4", torch.float32)
    how.bnb_4bit_quant_storage = torch.bfloat16
    loaded = AutoModelForCausalLM.from_pretrained(model, config=config, quantization_config=how)
    packed = loaded.model.layers[0].mlp.up_proj.weight
    assert packed.dtype == torch.bfloat16
    # Some of 256 patterns are no number.
    assert not packed.isfinite().all()
    loaded.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), load_config(str(tmp_path)), torch.float32)
    assert again.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
