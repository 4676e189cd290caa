"""What a group of processes that share out rows computes, beside one process. Run by every rank."""

from __future__ import annotations

import pickle
import random
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from itertools import cycle

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import lemo
from lemo import ops
from lemo.distributed import attention
from lemo.distributed.attention import SharedKeys, shared_attention
from lemo.distributed.context import ContextParallel
from lemo.distributed.dealing import deal
from lemo.ops.segment_attention import SavedAttention
from tiny_models import (
    all_of,
    flat_config,
    gradients,
    lora,
    make_ids,
    make_model,
    packed_batch,
    padded_batch,
)

CASES: dict[str, Callable[[], None]] = {}


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__] = function
    return function


def run_all(names: list[str]) -> dict[str, str]:
    """What went wrong, by the name of the case: this process's first error ends all of them."""
    torch.set_num_threads(1)
    for done, name in enumerate(names):
        torch.manual_seed(0)
        try:
            CASES[name]()
        except Exception:
            failures = dict.fromkeys(names[done + 1 :], f"not run after '{name}'")
            return failures | {name: traceback.format_exc()}
    return {}


def close(got: Tensor, expected: Tensor) -> None:
    """Equal but for the rounding of fp32 sums in another order."""
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-6 * (scale or 1.0))


# Attention


def lengths(seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.choice([0, 1, 2, 3, 5, 17, 40]) for _ in range(draw.randint(1, 5))] + [11]


def attention_inputs(counts: list[int], sinks: bool) -> dict[str, Tensor]:
    rows, heads, key_heads, size, value_size = sum(counts), 6, 3, 8, 16
    gaps = [torch.randint(1, 4, (count,)) for count in counts]
    return {
        "q": torch.randn(rows, heads, size),
        "k": torch.randn(rows, key_heads, size),
        "v": torch.randn(rows, key_heads, value_size),
        "dout": torch.randn(rows, heads, value_size),
        "positions": torch.cat([gap.cumsum(0) - 1 for gap in gaps]).int(),
        "cu_rows": torch.tensor([0, *torch.tensor(counts).cumsum(0)]).int(),
    } | ({"sinks": torch.randn(heads)} if sinks else {})


def check_attention(
    counts: list[int],
    window: int = 0,
    softcap: float = 0.0,
    sinks: bool = False,
    saves: bool = False,
    frozen: str = "",
):
    x = attention_inputs(counts, sinks)
    named = [name for name in ("q", "k", "v", "sinks") if name in x]
    trained = [name for name in named if name not in frozen]
    whole = {name: x[name].clone().requires_grad_(name in trained) for name in named}
    cu_rows, positions = x["cu_rows"], x["positions"]
    rows = (cu_rows, None, positions, positions)
    expected = ops.segment_attention(
        *(whole[name] for name in "qkv"),
        *rows,
        scale=0.3,
        window=window,
        softcap=softcap,
        sinks=whole.get("sinks"),
    )
    wanted = torch.autograd.grad(expected, [whole[name] for name in trained], x["dout"])

    context = ContextParallel(head_groups=2)
    dealt, cu_mine = deal(counts, context.size, context.rank, torch.device("cpu"))
    mine = dealt.of(context.rank)
    keys = SharedKeys(context, dealt, cu_rows, positions)
    own = {n: (x[n] if n == "sinks" else x[n][mine]).clone() for n in named}
    for name in trained:
        own[name].requires_grad_()
    saved = SavedAttention() if saves else None

    def attend() -> Tensor:
        return shared_attention(
            *(own[name] for name in "qkv"),
            keys,
            cu_mine,
            positions[mine],
            0.3,
            window,
            softcap,
            own.get("sinks"),
            saved,
        )

    if saves:
        with torch.no_grad():
            attend()
    got = attend()
    found = torch.autograd.grad(got, [own[name] for name in trained], x["dout"][mine])
    close(got, expected[mine])
    for name, gradient, of_all in zip(trained, found, wanted):
        if name == "sinks":
            close(context.size * context.average(gradient), of_all)
        else:
            close(gradient, of_all[mine])


@case
def attention_of_random_lengths():
    for seed in range(6):
        check_attention(lengths(seed), (0, 9)[seed % 2], 0.0, False, False)


@case
def attention_with_softcap_and_sinks():
    check_attention([23, 1, 14], 0, 3.0, True, False)


@case
def attention_that_is_saved():
    check_attention([23, 1, 14], 7, 0.0, True, True)


@case
def attention_that_has_to_be_deterministic():
    """On a GPU its backward sums in another order then."""
    asked, call = [], attention.call

    def listen(op, *arguments):
        if op is torch.ops.lemo.segment_attention_backward:
            asked.append(arguments[-1])
        return call(op, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "call", listen)
        for wanted in (True, False):
            patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda on=wanted: on)
            check_attention([23, 1, 14])
            assert {*asked} == {wanted}
            asked.clear()


@case
def attention_of_which_some_inputs_are_frozen():
    """As in a first layer some of whose projections have adapters."""
    for frozen in ("q", "k", "v", "qk", "qv", "kv"):
        check_attention([23, 1, 14], frozen=frozen)


@case
def attention_of_fewer_rows_than_processes():
    check_attention([1], 0, 0.0, False, False)
    check_attention([0, 1, 0, 1], 0, 0.0, False, False)


# Models


BATCHES = {
    "plain": lambda: {"input_ids": make_ids(1, 75), "labels": make_ids(1, 75)},
    "padded right": lambda: padded_batch([61, 8, 45]),
    "padded left": lambda: padded_batch([50, 30], side="left"),
    "packed": lambda: packed_batch([40, 3, 37]),
    "answers": lambda: answers(),
    "one label": lambda: answers(tokens=20, labels=slice(-1, None)),
    "short": lambda: packed_batch([2, 3]),
}


def answers(tokens: int = 70, labels: slice = slice(50, 58)) -> dict[str, Tensor]:
    """A prompt that repeats some of its words where the labels are."""
    ids = make_ids(1, tokens)
    ids[:, labels] = ids[:, 8 : 8 + ids[:, labels].shape[1]]
    of_answers = torch.full_like(ids, -100)
    of_answers[:, labels] = ids[:, labels]
    return {"input_ids": ids, "labels": of_answers}


@contextmanager
def context_of(model, config, **settings) -> Iterator[lemo.Handle]:
    handle = lemo.enable(model, config, ContextParallel(**settings))
    try:
        yield handle
    finally:
        handle.remove()


def with_everything(model):
    """LoRA, and every other weight, too, the head's and the embedding's among them."""
    model = lora(model)
    for parameter in model.parameters():
        parameter.requires_grad_()
    return model


def checkpointed(model):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return lora(model)


def checkpointed_by_hooks(model):
    """Parameters with hooks, whose layers torch's checkpoint function runs."""
    model = checkpointed(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient: 2 * gradient)
    return model


def scaled(model):
    """Attention scores of the second layer have another scale."""
    model.model.layers[1].self_attn.scaling *= 2
    return lora(model)


def trained(model, arguments, passes: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    for _ in range(passes):
        loss = model(**arguments).loss
        loss.backward()
    return loss.detach(), {name: g.clone() for name, g in gradients(model).items()}


DEFAULTS = {"block_size": 8, "keep": 0.5, "seed": 3}


def check_model(architecture: str, batch: str, adapt=lora, items=None, passes=1, **settings):
    """Loss and gradients of a group, in which all see the same batch, are those of one process."""
    config = flat_config(**DEFAULTS | settings)
    arguments = BATCHES[batch]()
    if items is not None:
        arguments["num_items_in_batch"] = items
    model = adapt(make_model(architecture, num_hidden_layers=2))
    one = lemo.enable(model, config)
    # The group draws what the first process draws.
    for elimination in (one.path.forward._of_text, one.path.forward._of_answers):
        elimination.scorer.begin_replica(0)
    one.begin_step(2, 10)
    expected = trained(model, arguments, passes)
    kept = [layer.attention_rows for layer in one.statistics()]
    one.remove()
    with context_of(model, config) as handle:
        handle.begin_step(2, 10)
        got = trained(model, arguments, passes)
        assert [layer.attention_rows for layer in handle.statistics()] == kept
    close(got[0], expected[0])
    assert got[1].keys() == expected[1].keys()
    assert any(bool(gradient.any()) for gradient in expected[1].values())
    for name, gradient in got[1].items():
        close(gradient, expected[1][name])


def model_case(name: str, *arguments, **settings) -> None:
    CASES[name] = partial(check_model, *arguments, **settings)


# Every way to pack with each share, and every mode of recomputation with each of both.
_MODES = cycle(("none", "selective", "layer"))
for _keep in (1.0, 0.5):
    for _batch, _mode in zip(BATCHES, _MODES):
        model_case(
            f"keep {_keep}, {_batch}, recompute {_mode}",
            *("llama", _batch),
            keep=_keep,
            recompute=_mode,
        )
for _batch, _mode in zip(BATCHES, _MODES):
    model_case(
        f"computed, {_batch}, recompute {_mode}",
        *("llama", _batch),
        visible_keys="computed",
        recompute=_mode,
    )
for _architecture, _batch in zip(("mistral", "qwen2", "qwen3", "opt"), cycle(BATCHES)):
    model_case(_architecture, _architecture, _batch)
model_case("all count in the loss", "llama", "packed", mask_loss=False)
model_case("burn-in, own chunks", "llama", "plain", burn_in=3, loss_chunk=7)
model_case("labels of a whole step, accumulated", "llama", "padded left", items=150, passes=2)
model_case("scores of the residual", "llama", "packed", scorer="pooled")
model_case("exact scores", "llama", "plain", scorer="exact", keep=0.3)
model_case("a threshold", "llama", "packed", policy="threshold", thresholds=[0.07] * 2)
model_case("answers", "llama", "answers", keep=0.3)
model_case("no label of some process", "llama", "one label", adapt=with_everything)
model_case("everything is trained", "llama", "padded right", adapt=with_everything)
model_case("layers of the model's own", "llama", "packed", path="generic")
model_case("layers of the model's own, all rows", "qwen3", "padded left", path="generic", keep=1.0)
model_case(
    "no label of some process, layers of the model's own", "opt", "one label", path="generic"
)
model_case("checkpointed", "llama", "packed", adapt=checkpointed)
model_case("checkpointed, of the model's own", "llama", "plain", adapt=checkpointed, path="generic")
model_case("checkpointed otherwise", "llama", "padded left", adapt=checkpointed_by_hooks)
model_case("scales of layers", "llama", "packed", adapt=scaled)
model_case("fewer rows than processes", "llama", "short")


# What surrounds a pass


@case
def other_losses_of_the_same_graph_count_once():
    model = lora(make_model("llama", num_hidden_layers=2))
    arguments = BATCHES["plain"]()
    config = flat_config(**DEFAULTS, keep_last=0)

    def penalty() -> Tensor:
        return sum(p.square().sum() for p in model.parameters() if p.requires_grad)

    def trained_with_penalty() -> dict[str, Tensor]:
        model.zero_grad()
        (model(**arguments).loss + 0.1 * penalty()).backward()
        model.eval()
        model(**arguments).loss.backward()  # the model's own forward, in every process
        model.train()
        return {name: g.clone() for name, g in gradients(model).items()}

    one = lemo.enable(model, config)
    one.path.forward._of_text.scorer.begin_replica(0)
    one.begin_step(0, 1)
    expected = trained_with_penalty()
    one.remove()
    with context_of(model, config) as handle:
        handle.begin_step(0, 1)
        for name, gradient in trained_with_penalty().items():
            close(gradient, expected[name])


@case
def bf16_errs_as_one_process_does():
    config, arguments = flat_config(**DEFAULTS, scorer="pooled"), BATCHES["packed"]()
    model = lora(make_model("llama", num_hidden_layers=2, dtype=torch.bfloat16))

    def of_one() -> Tensor:
        handle = lemo.enable(model, config)
        found = all_of(trained(model, arguments)[1])
        handle.remove()
        return found

    one = of_one()
    with context_of(model, config):
        group = all_of(trained(model, arguments)[1])
    model.float()
    exact = of_one()
    assert (group - exact).norm() <= 1.2 * (one - exact).norm()


@case
def nothing_is_averaged_behind_remove():
    model = lora(make_model("llama", num_hidden_layers=2))
    arguments = BATCHES["plain"]()
    with context_of(model, flat_config(**DEFAULTS)):
        trained(model, arguments)
        # A graph that is older than `remove` keeps the parameters' nodes.
        penalty = sum(p.sum() for p in model.parameters() if p.requires_grad)
    model.zero_grad()
    (dist.get_rank() * penalty).backward()
    for gradient in gradients(model).values():
        close(gradient, torch.full_like(gradient, dist.get_rank()))
    assert dist.get_rank() or trained(model, arguments)  # would wait for the others


@case
def the_loss_without_gradients():
    model = lora(make_model("llama", num_hidden_layers=2)).eval()
    arguments = BATCHES["padded right"]()
    config = flat_config(**DEFAULTS, scorer="pooled")
    with torch.no_grad():
        one = lemo.enable(model, config)
        expected = one.loss(**arguments)
        one.remove()
        with context_of(model, config) as handle:
            close(handle.loss(**arguments), expected)


@case
def verification_is_of_the_group():
    for path in ("native", "generic"):
        model = lora(make_model("llama", num_hidden_layers=2))
        with context_of(model, flat_config(**DEFAULTS, path=path)) as handle:
            handle.verify(BATCHES["padded left"]())
            # As if each process had its own rows alone.
            handle.path.forward.context.average = lambda gradient: gradient
            with pytest.raises(ValueError, match="lemo does not compute"):
                handle.verify(BATCHES["padded left"]())


@case
def ddp_averages_over_the_groups():
    """Two groups of half of the processes each, with a window of its own each."""
    count, rank = dist.get_world_size(), dist.get_rank()
    arguments = padded_batch([45, 61, 30, 20])
    items = int((arguments["labels"][:, 1:] != -100).sum())
    config = flat_config(**DEFAULTS, scorer="pooled")
    model = lora(make_model("llama", num_hidden_layers=2))
    halves = [
        {name: values[half] for name, values in arguments.items()}
        for half in (slice(0, 2), slice(2, 4))
    ]
    one = lemo.enable(model, config)
    losses = []
    for half in halves * 2:
        losses.append(model(**half, num_items_in_batch=items).loss)
        losses[-1].backward()
    expected = {name: g.clone() for name, g in gradients(model).items()}
    one.remove()

    mesh = init_device_mesh("cpu", (2, count // 2), mesh_dim_names=("dp", "cp"))
    # DDP takes the mean over the groups.
    mine = halves[mesh.get_local_rank("dp")] | {"num_items_in_batch": items / 2}
    for whole in (False, True):
        context = ContextParallel(mesh, averages_gradients=not whole, head_groups=3)
        assert context.replica == rank // (count // 2)
        # Of a group alone it is known who is in it.
        assert (
            ContextParallel(context.group).replica == dist.get_process_group_ranks(context.group)[0]
        )
        handle = lemo.enable(model, config, context)
        copied = handle.path.forward.context
        assert (copied.replica, copied.averages_gradients) == (context.replica, not whole)
        assert copied.head_groups == 3
        wrapped = DistributedDataParallel(
            model, process_group=None if whole else mesh.get_group("dp")
        )
        model.zero_grad()
        with wrapped.no_sync():
            wrapped(**mine).loss.backward()
        loss = wrapped(**mine).loss
        loss.backward()
        close(loss, 2 * losses[mesh.get_local_rank("dp")])
        for name, gradient in gradients(model).items():
            close(gradient, expected[name])
        handle.remove()


@case
def what_is_not_supported_is_refused_by_name():
    model = make_model("llama", num_hidden_layers=2)
    context = ContextParallel()
    for name, settings in {
        "visible_keys": {"visible_keys": "all"},
        "layerwise.group_size": {"group_size": 16},
        "layerwise: expected one kept set": {"select_at": "all", "scorer": "pooled"},
    }.items():
        with pytest.raises(NotImplementedError, match=name):
            lemo.enable(model, flat_config(**DEFAULTS | settings), context)
    settings = {"dense_layers": (0,), "keep_schedule": ((0.5, 1.0),)}
    with pytest.raises(NotImplementedError, match="one kept set"):
        lemo.enable(model, flat_config(**DEFAULTS | settings), context)
    arguments = BATCHES["plain"]()
    with context_of(model, flat_config(**DEFAULTS)):
        output = model(**arguments)
        with pytest.raises(NotImplementedError, match="logits or hidden states"):
            _ = output.logits
        with pytest.raises(NotImplementedError, match="logits or hidden states"):
            model(input_ids=arguments["input_ids"])
        with pytest.raises(NotImplementedError, match="output_hidden_states"):
            model(**arguments, output_hidden_states=True)
        embedded = model.get_input_embeddings()(arguments["input_ids"])
        with pytest.raises(NotImplementedError, match="inputs_embeds: expected embeddings without"):
            model(inputs_embeds=embedded, labels=arguments["labels"])
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(model)
        copied = deepcopy(model)
        close(trained(copied, arguments)[0], trained(model, arguments)[0])
    with pytest.raises(TypeError, match="expected a process group, .* got int"):
        lemo.enable(model, flat_config(**DEFAULTS), 2)
    mesh = init_device_mesh("cpu", (1, context.size), mesh_dim_names=("dp", "tp"))
    with pytest.raises(ValueError, match="dimension 'cp', got \\['dp', 'tp'\\]"):
        ContextParallel(mesh)
    with pytest.raises(ValueError, match="dimension 'cp', got 2 dimensions without names"):
        ContextParallel(init_device_mesh("cpu", (1, context.size)))
    for wrong in (0, True, 2.0):
        with pytest.raises(ValueError, match=f"head_groups: expected .* at least 1, got {wrong}"):
            ContextParallel(head_groups=wrong)


@case
def other_batches_and_other_weights_are_refused():
    rank = dist.get_rank()
    for path in ("native", "generic"):
        model = lora(make_model("llama", num_hidden_layers=2))
        arguments = BATCHES["plain"]()
        with context_of(model, flat_config(**DEFAULTS, path=path)):
            model(**arguments)
            for other in (
                {"input_ids": make_ids(1, 75, seed=rank), "labels": arguments["labels"]},
                {"input_ids": make_ids(1, 75 + rank), "labels": make_ids(1, 75 + rank)},
                arguments | ({"attention_mask": torch.ones(1, 75)} if rank else {}),
            ):
                with pytest.raises(ValueError, match="batch: expected the same in all processes"):
                    model(**other)
            assert model(**arguments).loss.isfinite()
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).add_(rank)
        with (
            context_of(model, flat_config(**DEFAULTS, path=path)),
            pytest.raises(ValueError, match="model: expected the same weights .*lora_A"),
        ):
            model(**arguments)


@case
def losses_of_routers_are_refused():
    from generic_cases import make

    model = make("mixtral")
    with (
        context_of(model, flat_config(**DEFAULTS)),
        pytest.raises(NotImplementedError, match="routers"),
    ):
        model(**BATCHES["plain"]())
