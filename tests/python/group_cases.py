"""A group of processes by itself: who is in it, what it compares, and what it hands round.

Run by every rank; `run` of processes.py returns where none of them raised an error.
"""

import re
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from bitsandbytes.nn import Params4bit
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import lemo
from lemo.distributed.agreement import check_batch, check_weights
from lemo.distributed.context import ContextParallel
from tiny_models import flat_config, lora, make_ids, make_model

CPU = torch.device("cpu")
CONFIG = flat_config(block_size=8, keep=0.5)


def processes_without_this_one_are_refused():
    alone = {"mesh_dim_names": ("dp", "cp")}
    groups = dist.new_group([0]), DeviceMesh("cpu", [0]), DeviceMesh("cpu", [[0]], **alone)
    for group in groups:
        if dist.get_rank() == 0:
            assert ContextParallel(group).size == 1
            continue
        with pytest.raises(ValueError, match="context_parallel: expected processes that include"):
            ContextParallel(group)


def arguments_are_compared_by_name_and_in_any_order():
    rank, group = dist.get_rank(), dist.group.WORLD
    ids, mask = make_ids(1, 9), torch.ones(1, 9)
    check_batch({}, CPU, group)
    given = {"input_ids": ids, "mask": mask}
    check_batch(dict(sorted(given.items(), reverse=bool(rank))), CPU, group)
    with pytest.raises(ValueError, match="batch: expected the same"):
        check_batch({"input_ids": ids, ("mask", "type_ids")[min(rank, 1)]: mask}, CPU, group)


def weights_that_differ_little_are_named():
    rank, group = dist.get_rank(), dist.group.WORLD
    # No number of bf16 is their sum.
    weights = [(name, torch.nn.Parameter(torch.ones(1000).bfloat16())) for name in "abcd"]
    nowhere = torch.nn.Parameter(torch.empty(3, device="meta"))
    check_weights([*weights, ("nowhere", nowhere)], CPU, group)
    check_weights([("nowhere", nowhere)], CPU, group)
    for count, named in (
        (3, "got others in a, b, c; seed"),
        (4, "got others in a, b, c, ...; seed"),
    ):
        for _, weight in weights[:count]:
            weight.data[5] = 1 + rank / 128
        with pytest.raises(ValueError, match=re.escape(named)):
            check_weights(weights, CPU, group)


def packed_weights_are_compared_by_their_bytes():
    """Bytes of 4 bits that are called floats may be no numbers, whose sums are all the same."""
    data = torch.full((8, 1), torch.nan, dtype=torch.bfloat16)
    packed = [("packed", Params4bit(data, bnb_quantized=True))]
    check_weights(packed, data.device, dist.group.WORLD)
    data.view(torch.uint8)[5] += dist.get_rank()
    with pytest.raises(ValueError, match="model: expected the same weights .* in packed"):
        check_weights(packed, data.device, dist.group.WORLD)


def values_are_handed_round_and_stay_as_they_are():
    context = ContextParallel()
    rank, size = context.rank, context.size
    of_first = torch.arange(6.0).view(2, 3)
    for share, expected in (
        (context.from_first, of_first),
        (context.total, size * of_first + size * (size - 1) / 2),
        (context.average, of_first + (size - 1) / 2),
    ):
        own = of_first + rank
        assert torch.equal(share(own), expected)
        assert torch.equal(own, of_first + rank)
    # The places in memory may be others in each process.
    turned = of_first.T if rank else of_first.T.contiguous()
    for share in (context.from_first, context.average):
        assert torch.equal(share(turned), turned)


def one_context_serves_two_models():
    """Each has its weights compared, and the mean of its gradients taken, by itself."""
    context, batch = ContextParallel(), {"input_ids": make_ids(1, 40), "labels": make_ids(1, 40)}
    models = [lora(make_model("llama", num_hidden_layers=1)) for _ in range(2)]
    handles = [lemo.enable(model, CONFIG, context) for model in models]
    models[0](**batch)
    with torch.no_grad():
        next(p for p in models[1].parameters() if p.requires_grad).add_(dist.get_rank())
    with pytest.raises(ValueError, match="model: expected the same weights"):
        models[1](**batch)
    handles[1].remove()
    models[0](**batch).loss.backward()
    check_gradients_are_the_same(models[0])


def a_copied_model_goes_on_behind_the_end_of_its_original():
    model = lora(make_model("llama", num_hidden_layers=1))
    handle = lemo.enable(model, CONFIG, ContextParallel())
    copied, ids = deepcopy(model), make_ids(1, 40)
    loss = copied(input_ids=ids, labels=ids).loss
    handle.remove()
    loss.backward()
    check_gradients_are_the_same(copied)


def check_gradients_are_the_same(model):
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert any(bool(gradient.any()) for gradient in gradients)
    for gradient in gradients:
        assert torch.equal(ContextParallel().from_first(gradient), gradient)


def the_mean_of_a_gradient_is_taken_once():
    context, batch = ContextParallel(), {"input_ids": make_ids(1, 40), "labels": make_ids(1, 40)}
    model = lora(make_model("llama", num_hidden_layers=1))
    handle = lemo.enable(model, CONFIG, context)
    own, taken = handle.context_parallel, []
    average = own.average
    own.average = lambda values: taken.append(1) or average(values)
    trained = sum(p.requires_grad for p in model.parameters())
    for _ in range(3):
        model(**batch).loss.backward()
        assert len(taken) == trained
        taken.clear()
    # Begun again, as behind a trainer that took the mean itself.
    own.stop_averaging()
    model(**batch).loss.backward()
    assert len(taken) == trained


class _Nothing(torch.autograd.Function):
    """What no gradient goes through."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        return None


def a_parameter_without_a_gradient_has_no_mean():
    model = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    ContextParallel().begin(model, {})
    _Nothing.apply(model.weight).sum().backward()
    assert model.weight.grad is None


def sharded_weights_are_refused_where_lemo_takes_the_mean():
    model = lora(make_model("llama", num_hidden_layers=1))
    handle = lemo.enable(model, CONFIG, ContextParallel())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (*model.get_base_model().model.layers, model):
        fully_shard(part, mesh=mesh)
    ids = make_ids(1, 40)
    with pytest.raises(NotImplementedError, match="averages_gradients=False"):
        model(input_ids=ids, labels=ids)
    handle.remove()
