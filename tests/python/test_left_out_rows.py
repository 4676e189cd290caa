"""Rows that no layer keeps cost nothing beyond their ids, labels and masks."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lemo
from lemo import LemoConfig
from lemo.planner.rows import embeds_all
from lemo.selection.scorers.answers import AnswerScorer
from lemo.selection.scorers.base import Scorer
from model_cases import BATCHES
from planner_cases import PeakOfTensors
from tiny_models import config_of, gradients, lora, make_ids, make_model
from tolerances import assert_close_fp32, assert_same_sums

# What is known of a token for a moment: its id, label, next label and position in int64, its row
# and position in int32, masks, and sums of masks.
BYTES = 48


def peak(model, tokens, **settings):
    """The highest bytes of tensors of a step of which 64 tokens are kept."""
    ids = make_ids(1, tokens)
    config = {"keep": 64 / tokens, "block_size": 16, "scorer": "random", "path": "native"}
    handle = lemo.enable(model, LemoConfig(**config | settings))
    with PeakOfTensors(model) as tensors:
        model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad()
    handle.remove()
    return tensors.peak


@pytest.mark.cpu_only
@pytest.mark.parametrize("checkpointing", [False, True])
def test_bytes_of_a_token_that_is_left_out(checkpointing):
    """A residual would take 512 bytes a token, and a table of rotations 64."""
    model = lora(make_model("llama", hidden_size=128, max_position_embeddings=2**15))
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    few, many = (peak(model, tokens) for tokens in (2**13, 2**15))
    assert many - few < BYTES * (2**15 - 2**13)


class EmbeddingSums(TorchDispatchMode):
    """Gradients of embeddings are summed in fp32 and rounded once.

    PyTorch's own kernel on a GPU adds up to 32 rows at a time to a weight in bf16, so there sums
    over other sets of rows are rounded at other places.
    """

    def __init__(self):
        super().__init__()
        self.sums = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function is not torch.ops.aten.embedding_dense_backward.default:
            return function(*arguments, **(keywords or {}))
        self.sums += 1
        gradient, ids, num_weights, padding, by_frequency = arguments
        assert not by_frequency
        rows, ids = gradient.flatten(0, -2).float(), ids.flatten()
        rows = rows.masked_fill((ids == padding)[:, None], 0)
        sums = torch.zeros(num_weights, rows.shape[1], device=rows.device)
        return sums.index_add_(0, ids, rows).to(gradient.dtype)


def backward(loss):
    """Runs the backward pass with exact sums of the embeddings' gradients."""
    with EmbeddingSums() as exact:
        loss.backward()
    assert exact.sums


def whole(handle):
    """Makes the handle's scorers say that they read the residual, so that all is embedded."""
    handle._forward.elimination.scorer.reads_residual = True


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "opt"])
def test_bits_are_those_of_rows_that_were_embedded_with_the_others(architecture, name):
    batch, found = BATCHES[name](), []
    for embed_all in (False, True):
        model = make_model(architecture)
        config = config_of(keep=0.5, scorer="random", block_size=8, dense_layers=[], seed=3)
        handle = lemo.enable(model, config)
        if embed_all:
            whole(handle)
        loss = model(**batch).loss
        backward(loss)
        found.append((loss.detach(), gradients(model)))
    (loss, gradient), (expected, oracle) = found
    assert torch.equal(loss, expected)
    for parameter, value in oracle.items():
        if "embed" in parameter:  # sums over rows in another order
            assert_same_sums(gradient[parameter], value, parameter)
        else:
            assert torch.equal(gradient[parameter], value), parameter


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotations_that_depend_on_the_length(kind):
    """The last token is left out, and the others are still rotated as of the whole length."""
    rotation = {"rope_type": kind, "rope_theta": 10000.0}
    if kind == "dynamic":
        rotation |= {"factor": 4.0}
    else:
        factors = {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
        rotation |= {**factors, "original_max_position_embeddings": 32, "factor": 2.0}
    ids, found = make_ids(1, 64), []
    for embed_all in (False, True):
        overrides = {"max_position_embeddings": 32, "rope_parameters": rotation}
        model = make_model("llama", **overrides)
        handle = lemo.enable(
            model,
            LemoConfig(keep=0.25, scorer="given", block_size=8, keep_last=0),
        )
        if embed_all:
            whole(handle)
        scores = torch.arange(64.0, 0, -1)[None]
        with handle.scored(scores):
            loss = model(input_ids=ids, labels=ids).loss
        assert handle.statistics()[0].attention_blocks.tolist() == [0, 1]
        found.append(loss)
    assert torch.equal(*found)


def test_a_hook_on_the_embedding_sees_all_tokens():
    """It may do what depends on their number, as NEFTune's noise does."""
    model, seen = make_model("llama"), []
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: seen.append(tuple(output.shape))
    )
    lemo.enable(model, LemoConfig(keep=0.5, scorer="random", block_size=8))
    ids = make_ids(2, 40)
    model(input_ids=ids, labels=ids).loss.backward()
    assert [shape[:2] for shape in seen] == [(2, 40)]


class SoftPrompt(nn.Embedding):
    """The first tokens of a sequence are vectors of its own."""

    def forward(self, ids):
        embedded = super().forward(ids)
        return torch.cat((self.weight[:3].expand(len(ids), 3, -1), embedded[:, 3:]), dim=1)


def test_an_embedding_of_the_user_sees_all_tokens():
    model, ids, found = make_model("llama"), make_ids(2, 40), []
    embedding = SoftPrompt(*model.get_input_embeddings().weight.shape)
    embedding.weight = model.get_input_embeddings().weight
    model.set_input_embeddings(embedding)
    handle = lemo.enable(model, LemoConfig(keep=0.5, scorer="random", block_size=8))
    for inputs in ({"input_ids": ids}, {"inputs_embeds": embedding(ids)}):
        handle.begin_step(0, 1)
        found.append(model(**inputs, labels=ids).loss)
    assert_close_fp32(found[0].detach(), found[1].detach())


def test_embeddings_of_the_caller():
    ids, found = make_ids(2, 40), []
    for given in (False, True):
        model = make_model("llama")
        lemo.enable(model, LemoConfig(keep=0.5, scorer="random", block_size=8))
        embedding: nn.Module = model.get_input_embeddings()
        inputs = {"inputs_embeds": embedding(ids)} if given else {"input_ids": ids}
        backward(model(**inputs, labels=ids).loss)
        found.append(gradients(model))
    for name, value in found[0].items():
        assert_same_sums(found[1][name], value, name)


def test_the_planner_knows_which_scorers_read_the_residual():
    read = {cls.__name__: cls.reads_residual for cls in Scorer.__subclasses__()}
    read |= {cls.__name__: cls.reads_residual for cls in AnswerScorer.__subclasses__()}
    names = LemoConfig.model_fields["scorer"].annotation.__args__
    for name in set(names) - {"auto"}:
        config = LemoConfig.model_construct(scorer=name)
        assert embeds_all(config) == read[f"{name.capitalize()}Scorer"], name
