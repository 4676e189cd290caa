"""Bytes that a layer stores with LoRA on every linear layer (docs/design/recomputation.md)."""

import pytest
import torch

import lemo
from model_checks import saved_bytes
from tiny_models import LINEAR, config_of, lora, make_ids, make_model

TOKENS, HEADS, KV_HEADS, DIM, WIDTH, RANK = 128, 4, 2, 32, 192, 8
HIDDEN = HEADS * DIM
INPUTS = 6 * HIDDEN + WIDTH  # of q, k, v, o, gate, up and down
OUTPUTS = 3 * HIDDEN + 2 * KV_HEADS * DIM + 2 * WIDTH

# Settings of LoRA; adapters are in fp32, as PEFT makes them, where the name says nothing else.
CASES = {
    "fp32 adapters": {},
    "bf16 adapters": {},
    "autocast": {},
    "autocast of fp32": {},
    "dropout": {"lora_dropout": 0.05},
    "dropout, bf16 adapters": {"lora_dropout": 0.05},
    "a bias of LoRA": {"lora_bias": True},
    "a trained bias": {"bias": "all"},
    "DoRA": {"use_dora": True},
    "DoRA, dropout": {"use_dora": True, "lora_dropout": 0.05},
    "two adapters": {},
}


def is_split(case):
    """Whether fp32 pairs multiply as sums of two bf16 numbers, in three blocks of their rank."""
    on_gpu = torch.get_default_device().type == "cuda"
    return on_gpu and not any(other in case for other in ("bf16 adapters", "autocast", "DoRA"))


def arithmetic(case):
    """For each kept row and layer: what every layer stores, and what the pairs add."""
    # Two gathered rows, two outputs of norms, q and attention's output; k and v; gate, up and their
    # product; the logarithms of attention and two reciprocals of norms.
    stored = 2 * (6 * HIDDEN + 2 * KV_HEADS * DIM + 3 * WIDTH) + 4 * (HEADS + 2)
    if case == "autocast of fp32":
        # The residual and what norms make of it are in fp32.
        stored += 2 * 4 * HIDDEN
    in_bf16 = "autocast" in case or "bf16" in case
    of_products = 3 * 2 if is_split(case) else 2 if in_bf16 else 4
    stored += adapters_of(case) * len(LINEAR[:7]) * RANK * of_products
    return stored + (INPUTS // 8 if "dropout" in case else 0)


def adapters_of(case):
    return 2 if case == "two adapters" else 1


def made(case, layers):
    model = make_model(
        "llama",
        dtype=torch.float32 if case == "autocast of fp32" else torch.bfloat16,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        num_hidden_layers=layers,
        max_position_embeddings=TOKENS,
        attention_bias="bias" in case,
    )
    model = lora(model, r=RANK, **CASES[case])
    if "bf16" in case:
        model = model.to(torch.bfloat16)
    if case == "two adapters":
        model.add_adapter("other", model.peft_config["default"])
        model.base_model.set_adapter(["default", "other"])
    return model.train()


@pytest.mark.parametrize("keep", [1.0, 0.25])
@pytest.mark.parametrize("case", CASES)
def test_bytes_are_those_of_the_arithmetic(case, keep):
    sizes, layers = [], (2, 4)
    for count in layers:
        model, ids = made(case, count), make_ids(1, TOKENS)
        handle = lemo.enable(
            model,
            config_of(keep=keep, mask_loss=False, recompute="none", block_size=8, dense_layers=[]),
        )
        with torch.autocast(ids.device.type, torch.bfloat16, enabled="autocast" in case):
            assert handle.general_modules() == {}
            sizes.append(saved_bytes(model, {"input_ids": ids, "labels": ids}))
    of_layer = (sizes[1] - sizes[0]) / (layers[1] - layers[0])
    if "DoRA" in case:
        # Norms and scales of the columns, whatever the number of rows.
        of_layer -= 2 * 4 * OUTPUTS
    if "autocast" in case or is_split(case):
        # Adapters as the products take them, whatever the number of rows.
        blocks = 3 if is_split(case) else 1
        of_layer -= blocks * adapters_of(case) * 2 * RANK * (INPUTS + OUTPUTS)
    assert of_layer == keep * TOKENS * arithmetic(case)


def test_fp32_adapters_store_what_bf16_ones_do_but_for_products_of_their_rank():
    of_products = 3 * 2 if is_split("fp32 adapters") else 4
    more = arithmetic("fp32 adapters") - arithmetic("bf16 adapters")
    assert more == 7 * RANK * (of_products - 2)
