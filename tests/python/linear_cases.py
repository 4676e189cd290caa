"""Linear layers with LoRA of PEFT, and what a pass of one gives; shared by tests."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lemo.models.projections.linear import apply_linear

ROWS, INPUTS, OUTPUTS = 37, 24, 40
# Columns that are no multiple of 8: rows of dropout's bits end in the middle of a byte.
RAGGED = 21

# What the layer's LoRA is, beside the defaults.
CONFIGURATIONS = {
    "plain": {},
    "dropout": {"lora_dropout": 0.3},
    "rsLoRA and patterns": {
        "use_rslora": True,
        "rank_pattern": {"0": 3},
        "alpha_pattern": {"0": 5},
    },
    "bias of LoRA": {"lora_bias": True},
    "bias of LoRA, dropout": {"lora_bias": True, "lora_dropout": 0.3},
    "trained bias": {"bias": "all"},
    "two adapters": {"adapters": 2},
    "two adapters, dropout": {"adapters": 2, "lora_dropout": 0.3},
    "DoRA": {"use_dora": True},
    "DoRA, dropout": {"use_dora": True, "lora_dropout": 0.3},
    "DoRA, trained bias": {"use_dora": True, "bias": "all"},
}
# (dtype of the layer, of the adapters, whether autocast is on)
PRECISIONS = {
    "fp32 adapters": (torch.bfloat16, torch.float32, False),
    "bf16 adapters": (torch.bfloat16, torch.bfloat16, False),
    "autocast": (torch.bfloat16, torch.float32, True),
    "autocast of fp32": (torch.float32, torch.float32, True),
    "autocast of bf16": (torch.bfloat16, torch.bfloat16, True),
}


def lora_layer(
    dtype=torch.float32,
    has_bias=True,
    adapter_dtype=None,
    adapters=1,
    inputs=INPUTS,
    seed=0,
    **settings,
):
    """A PEFT layer around a frozen linear one; equal arguments give equal weights."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(inputs, OUTPUTS, bias=has_bias)).to(dtype)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["0"]} | settings
    config = LoraConfig(init_lora_weights=False, **settings)
    peft = get_peft_model(model, config, autocast_adapter_dtype=False)
    names = [f"{i}" for i in range(1, adapters)]
    for name in names:
        peft.add_adapter(name, config, autocast_adapter_dtype=False)
    layer = peft.base_model.model[0]
    layer.set_adapter(["default", *names])
    for name, parameter in layer.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.to(adapter_dtype or dtype)
        if "magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.randn_like(parameter)
    return layer.train()


def nodes(tensor):
    """Names of the autograd nodes behind a tensor."""
    found, todo = set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None:
            found.add(type(node).__name__)
            todo += [parent for parent, _ in node.next_functions]
    return found


def draw_as_lemo_does(monkeypatch):
    """On GPUs torch's own dropout makes other masks of the same numbers than `bernoulli_` does."""

    def dropout(x, p, training, inplace):
        assert training
        assert not inplace
        mask = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p)
        return x * mask / (1 - p)

    if torch.get_default_device().type != "cpu":
        monkeypatch.setattr(nn.functional, "dropout", dropout)


def run(function, layer, x, dy, autocast=False):
    """{name: tensor} of the result and the gradients, and the names of the nodes."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    torch.manual_seed(1)  # for dropout
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        y = function(x)
    y.backward(dy.to(y.dtype))
    found = {"y": y.detach(), "x": x.grad}
    found |= {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return found, nodes(y)


def inputs(dtype=torch.float32, columns=INPUTS):
    torch.manual_seed(2)
    return torch.randn(ROWS, columns).to(dtype), torch.randn(ROWS, OUTPUTS).to(dtype)


def of_lemo(layer, values=True):
    return lambda x: apply_linear(layer, x, values)


def runs_as_a_node(names):
    return bool(names & {"_LinearBackward", "_DoraBackward"})
