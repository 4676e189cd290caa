"""Weights of a run in shares of its processes, by FSDP2: sharding, and whole tensors for files."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lemo.settings.finetune import FinetuneConfig
from lemo.training.quantised import is_in_4_bits, is_quantised


def check_sharding(config: FinetuneConfig, model_config: Any, accelerator: Accelerator) -> None:
    """Refuses what does not go with `shard`.

    Raises:
        ValueError: a single process, weights in 8 bits, or fp16.
    """
    if accelerator.num_processes == 1:
        raise ValueError(
            "shard: expected several processes, which share the weights, got one; start with "
            "torchrun --nproc_per_node N"
        )
    if not _can_be_cut(config.quantize, model_config):
        raise ValueError(
            "shard: expected weights that are not quantised, or in 4 bits of bitsandbytes (nf4), "
            f"which FSDP2 can cut, got quantize '{config.quantize or 'as stored'}'"
        )
    if accelerator.mixed_precision == "fp16":
        raise ValueError("shard: expected dtype bfloat16 or float32, got float16")


def _can_be_cut(quantize: str | None, model_config: Any) -> bool:
    """Whether each process can have a share of the weights: their statistics lie beside them."""
    if quantize is not None:
        return quantize == "nf4"
    return not is_quantised(model_config) or is_in_4_bits(model_config)


def shard(model: PeftModel, accelerator: Accelerator) -> None:
    """Cuts the weights of every layer, and what is left, into a share for each process.

    A layer is whole while it runs. The embedding is a unit of its own, unless the head has the same
    weight; the head stays whole from its first use to the end of backward.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    base = model.get_base_model()
    _store_as_floats(base)
    for layer in base.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if embedding.weight is not head.weight:
        fully_shard(embedding, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _store_as_floats(model: nn.Module) -> None:
    """Calls packed weights of 4 bits numbers of a floating dtype, whose bytes are the same.

    FSDP2 of torch 2.11 cuts no others, and bitsandbytes reads bytes of either.
    """
    for module in model.modules():
        layer: Any = module
        weight = layer._parameters.get("weight")
        if hasattr(weight, "quant_state") and not weight.is_floating_point():
            weight.data = weight.data.flatten().view(torch.bfloat16)[:, None]
            weight.quant_storage = layer.quant_storage = torch.bfloat16


def reduces(model: nn.Module, wanted: bool) -> None:
    """Says whether backward reduces the gradients of a sharded model, or only adds them up."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(wanted)


def whole(value: Any) -> Any:
    """`value`, of nested dicts and lists, with whole tensors; every process has to call it."""
    # A process alone has no others, and hundreds of tensors to look at.
    return _whole(value) if torch.distributed.is_initialized() else value


def _whole(value: Any) -> Any:
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {name: _whole(item) for name, item in value.items()}
    return [_whole(item) for item in value] if isinstance(value, list) else value


def cut(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, cut as another one is."""
    if not isinstance(like, DTensor):
        return tensor
    tensor = tensor.to(like.device)
    # Each takes its own share: files may be read in another order by every process.
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def cut_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state dict of an optimizer, from whole tensors, cut as its parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    by_index = {
        index: {
            name: cut(value, parameters[index])
            if torch.is_tensor(value) and value.shape == parameters[index].shape
            else value
            for name, value in entries.items()
        }
        for index, entries in state["state"].items()
    }
    return {**state, "state": by_index}
