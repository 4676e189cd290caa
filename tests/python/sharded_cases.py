"""Models that FSDP2 shards, beside the same models whole: what a process of a group measures."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import bitsandbytes
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import PeftModel
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

import lemo
from lemo import ops
from lemo.models.calls.outputs import DeferredLogits
from lemo.ops import linear_cross_entropy
from tiny_models import all_of, config_of, gradients, lora, make_ids, make_model
from tolerances import relative_error

TOKENS = 40
# In which of the two paths.
NATIVE, GENERIC, BOTH = ("native",), ("generic",), ("native", "generic")


@dataclass(frozen=True)
class Case:
    """A way to shard, and settings.

    Attributes:
        settings: of lemo; "random" scores unless they say otherwise.
        shard: shards a model; of the functions below.
        options: of `fully_shard`.
        model: settings of the model.
        architecture: its name.
        dtype: of the frozen weights; adapters are fp32.
        stored: dtype in which 4 bits of the decoder's linear layers are packed; None: they are
            not quantised.
        first: whether the model is sharded before lemo is enabled.
        run: one training step, see below.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    shard: str = "root"
    options: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    architecture: str = "llama"
    dtype: torch.dtype = torch.float32
    stored: torch.dtype | None = None
    first: bool = False
    run: str = "labels"
    paths: tuple[str, ...] = BOTH


MIXED = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

CASES = {
    "keep 1": Case({"keep": 1.0}),
    "keep 1, before enable": Case({"keep": 1.0}, first=True),
    "keep 1, opt": Case({"keep": 1.0}, architecture="opt", paths=NATIVE),
    "keep 1, tied": Case({"keep": 1.0}, model={"tie_word_embeddings": True}),
    "none": Case({"recompute": "none"}, paths=NATIVE),
    "layer": Case({"recompute": "layer"}, paths=NATIVE),
    "selective": Case({"recompute": "selective"}, paths=NATIVE),
    "auto, checkpointing": Case(run="checkpointing"),
    "computed": Case({"visible_keys": "computed", "recompute": "layer"}, paths=NATIVE),
    "all keys": Case({"visible_keys": "all"}, paths=NATIVE),
    "own sets": Case({"keep_mlp": 0.25, "select_at": "all", "recompute": "layer"}, paths=NATIVE),
    "exact": Case({"scorer": "exact", "recompute": "layer"}, paths=NATIVE),
    "embedding and tail": Case(shard="split"),
    "tied tail": Case(shard="tied", model={"tie_word_embeddings": True}),
    "head": Case(shard="head"),
    "layers alone": Case(shard="layers", first=True),
    "decoder": Case(shard="decoder"),
    "accelerate": Case(shard="accelerate"),
    "accelerate, tied": Case(shard="accelerate", model={"tie_word_embeddings": True}, paths=NATIVE),
    "mlps": Case(shard="mlps"),
    "adapters whole": Case({"recompute": "layer"}, shard="ignored", paths=NATIVE),
    "kept gathered": Case(options={"reshard_after_forward": False}),
    "frozen bf16": Case(dtype=torch.bfloat16),
    "nf4": Case(model={"hidden_size": 64}, stored=torch.bfloat16),
    "nf4, layer": Case(
        {"recompute": "layer"}, model={"hidden_size": 64}, stored=torch.float32, paths=NATIVE
    ),
    "accumulation": Case(run="accumulation"),
    "without labels": Case(run="logits"),
    "logits read late": Case(run="late"),
}


def measure(names: Iterable[str]) -> dict[str, dict[str, float] | str]:
    """By "case, path": errors against the whole model, or what was raised."""
    torch.set_num_threads(1)  # there are more processes than cores
    found: dict[str, dict[str, float] | str] = {}
    for name in names:
        for path in CASES[name].paths:
            try:
                found[f"{name}, {path}"] = _errors(CASES[name], path)
            except ValueError as error:
                found[f"{name}, {path}"] = str(error)
    return found


def _errors(case: Case, path: str) -> dict[str, float]:
    """Relative errors of the loss and, the largest, of the gradients of one parameter."""
    settings: dict[str, Any] = {"keep": 0.5, "block_size": 8, "scorer": "random", "path": path}
    config = config_of(**settings | {"dense_layers": ()} | case.settings)
    rank, count = distributed.get_rank(), distributed.get_world_size()
    everything = make_ids(2 * count, TOKENS)
    mine = everything[2 * rank : 2 * rank + 2]

    whole = _model(case)
    if config.keep == 1:
        # One process with all of the data, and without lemo.
        ids, handle = everything, None
    else:
        ids, handle = mine, lemo.enable(whole, config)
    expected = RUNS[case.run](whole, handle, ids)
    wanted = gradients(whole)
    if handle is not None:
        _average([expected, *wanted.values()])

    model = _model(case)
    if case.first:
        shard(model, case)
    handle = lemo.enable(model, config)
    if not case.first:
        shard(model, case)
    loss = RUNS[case.run](model, handle, mine)
    _average([loss])
    got = gradients(model)
    replicated = [gradient for gradient in got.values() if not isinstance(gradient, DTensor)]
    _average(replicated)
    got = {name: _full(gradient) for name, gradient in got.items()}
    assert got.keys() == wanted.keys()
    return {
        "loss": relative_error(loss, expected),
        "gradients": max(relative_error(got[name], wanted[name]) for name in wanted),
    }


def mixed_precision() -> dict[str, float]:
    """Relative errors of gradients that are computed in bf16, by what computes them."""
    torch.set_num_threads(1)
    rank, count = distributed.get_rank(), distributed.get_world_size()
    everything, case = make_ids(2 * count, TOKENS), Case(options={"mp_policy": MIXED})
    oracle = _model(case)
    _labels(oracle, None, everything)
    wanted = all_of(gradients(oracle))
    errors = {}
    for path in ("plain", *BOTH):
        model, handle = _model(case), None
        if path != "plain":
            settings = {"keep": 1.0, "block_size": 8, "scorer": "random", "dense_layers": ()}
            handle = lemo.enable(model, config_of(path=path, **settings))
        shard(model, case)
        _labels(model, handle, everything[2 * rank : 2 * rank + 2])
        got = {name: _full(gradient) for name, gradient in gradients(model).items()}
        errors[path] = relative_error(all_of(got), wanted)
    return errors


def refusals() -> list[str]:
    """What is raised where weights are not whole when lemo computes with them."""
    torch.set_num_threads(1)
    case, said = Case(), []
    ids = make_ids(1, TOKENS)
    config = config_of(keep=0.5, block_size=8, scorer="random", dense_layers=())
    inner = _model(case)
    handle = lemo.enable(inner.get_base_model(), config)
    shard(inner, case)
    cut = _model(case)
    lemo.enable(cut, config)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    plan = {"model.layers.1.mlp.down_proj.base_layer": RowwiseParallel()}
    parallelize_module(cut.get_base_model(), mesh, plan)
    for call in (
        lambda: inner.get_base_model()(ids, labels=ids),
        lambda: handle.verify({"input_ids": ids}),
        lambda: cut(ids, labels=ids),
    ):
        try:
            call()
        except ValueError as error:
            said.append(str(error))
    return said


def verification() -> list[str]:
    """What verify says of a sharded model: as it is, and where lemo computes something else."""
    torch.set_num_threads(1)
    said = []
    for path in BOTH:
        model = _model(Case())
        settings = {"keep": 0.5, "block_size": 8, "scorer": "random", "dense_layers": ()}
        handle = lemo.enable(model, config_of(path=path, **settings))
        shard(model, Case())
        ids = make_ids(1, TOKENS)
        handle.verify({"input_ids": ids})
        assert not gradients(model)
        with mock.patch.object(ops, "linear_cross_entropy", _doubled):
            try:
                handle.verify({"input_ids": ids})
            except ValueError as error:
                said.append(str(error))
    return said


def _doubled(*arguments: Any, **options: Any) -> Tensor:
    return 2 * linear_cross_entropy(*arguments, **options)


def others() -> tuple[dict[str, float], list[str], list[str]]:
    """All that is no case."""
    return mixed_precision(), refusals(), verification()


def _model(case: Case) -> PeftModel:
    base = make_model(case.architecture, dtype=case.dtype, **case.model)
    if case.stored is not None:
        _quantise(base, case.stored)
    model = lora(base)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _quantise(model: nn.Module, stored: torch.dtype) -> None:
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if not isinstance(linear, nn.Linear):
                    continue
                new = bitsandbytes.nn.Linear4bit(
                    linear.in_features,
                    linear.out_features,
                    bias=False,
                    quant_type="nf4",
                    quant_storage=stored,
                )
                new.weight = bitsandbytes.nn.Params4bit(
                    linear.weight.data.clone(), quant_type="nf4", quant_storage=stored, module=new
                )
                setattr(parent, name, new.to("cpu"))
    model.is_loaded_in_4bit = True
    model.requires_grad_(False)


def decoder_of(model: PeftModel) -> nn.Module:
    base = model.get_base_model()
    return base.model.decoder if hasattr(base.model, "decoder") else base.model


def shard(model: PeftModel, case: Case) -> None:
    """Shards layers and model in the way of the case."""
    base, decoder = model.get_base_model(), decoder_of(model)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    if case.shard == "accelerate":
        _by_accelerate(model, type(decoder.layers[0]).__name__)
        return
    options = {"mesh": mesh} | case.options
    if case.shard == "ignored":
        options["ignored_params"] = {p for p in model.parameters() if p.requires_grad}
    if case.shard == "mlps":
        for layer in decoder.layers:
            fully_shard(layer.mlp, **options)
    for layer in decoder.layers:
        fully_shard(layer, **options)
    if case.shard == "split":
        fully_shard(decoder.embed_tokens, **options)
        fully_shard([decoder.norm, base.lm_head], **options)
    elif case.shard == "tied":
        fully_shard([decoder.norm, decoder.embed_tokens, base.lm_head], **options)
    elif case.shard == "head":
        fully_shard(base.lm_head, **options)
    elif case.shard == "decoder":
        fully_shard(decoder, **options)
    if case.shard != "layers":
        fully_shard(model, **options)


def _by_accelerate(model: PeftModel, layer: str) -> None:
    """As Accelerator.prepare does, which itself does so on GPUs only."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[layer],
        cpu_ram_efficient_loading=False,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        is_main_process=distributed.get_rank() == 0,
        device=torch.device("cpu"),
    )
    assert fsdp2_prepare_model(accelerator, model) is model


def _labels(model: PeftModel, handle: lemo.Handle | None, ids: Tensor) -> Tensor:
    """A step; returns its loss."""
    if handle is not None:
        handle.begin_step(0, 1)
    # FSDP goes through what the model returns, which must not compute the logits.
    with mock.patch.object(DeferredLogits, "read", side_effect=AssertionError("logits are read")):
        loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.detach()


def _checkpointing(model: PeftModel, handle: lemo.Handle | None, ids: Tensor) -> Tensor:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return _labels(model, handle, ids)


def _accumulation(model: PeftModel, handle: lemo.Handle | None, ids: Tensor) -> Tensor:
    sync: Callable[[bool], None] = getattr(model, "set_requires_gradient_sync", lambda _: None)
    sync(False)
    first = _labels(model, handle, ids[:1])
    sync(True)
    return first + _labels(model, handle, ids)


def _logits(model: PeftModel, handle: lemo.Handle | None, ids: Tensor) -> Tensor:
    assert handle is not None
    handle.begin_step(0, 1)
    labels = torch.ones_like(ids)
    context = handle.labelled(labels)
    if handle.config.path == "generic":
        context = torch.enable_grad()  # every row is computed
    with context:
        logits = model(ids).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return loss.detach()


def _late(model: PeftModel, handle: lemo.Handle | None, ids: Tensor) -> Tensor:
    output = model(ids, labels=ids)
    output.loss.backward()
    output.logits  # noqa: B018
    return output.loss.detach()


RUNS: dict[str, Callable[[PeftModel, lemo.Handle | None, Tensor], Tensor]] = {
    "labels": _labels,
    "checkpointing": _checkpointing,
    "accumulation": _accumulation,
    "logits": _logits,
    "late": _late,
}


def _average(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        distributed.all_reduce(tensor)
        tensor /= distributed.get_world_size()


def _full(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
