"""Models whose linear layers are put into 4 or 8 bits of bitsandbytes."""

import pytest
import torch
from torch import nn


def decoder_layers(model):
    return next(m for name, m in model.named_modules() if name.endswith("layers"))


def layers_with_linears(model):
    for layer in decoder_layers(model):
        for module in list(layer.modules()):
            for name, child in module.named_children():
                if type(child) is nn.Linear:
                    yield module, name, child


def quantise(model, kind, stored=torch.uint8, nested=True):
    """Puts layers of bitsandbytes in place of the decoder layers' linear ones.

    Where it is `nested`, the scales are quantised, too.
    """
    settings = {"quant_type": "nf4", "quant_storage": stored, "compress_statistics": nested}
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for module, name, linear in layers_with_linears(model):
        has_bias = linear.bias is not None
        if kind == "nf4":
            new = bitsandbytes.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=has_bias, **settings
            )
            new.weight = bitsandbytes.nn.Params4bit(
                linear.weight.data.clone(), module=new, **settings
            )
        else:
            new = bitsandbytes.nn.Linear8bitLt(
                linear.in_features, linear.out_features, bias=has_bias, has_fp16_weights=False
            )
            new.weight = bitsandbytes.nn.Int8Params(
                linear.weight.data.clone(), requires_grad=False, has_fp16_weights=False
            )
        if has_bias:
            new.bias = linear.bias
        setattr(module, name, new.to("cpu"))
    setattr(model, "is_loaded_in_4bit" if kind == "nf4" else "is_loaded_in_8bit", True)
    return model.requires_grad_(False)
