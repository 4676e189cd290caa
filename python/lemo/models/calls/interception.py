"""Whether the parts of a model are Transformers' own, as lemo assumes.

lemo runs attention and rotation of a decoder layer itself, and plain norms, projections and MLPs
through kernels of its own. What another library or the user put around or in place of these would
silently not run: so a plain part that was changed runs as the module it is, and a changed layer or
attention module is refused.
"""

import functools
import inspect
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules import module as of_all_modules
from transformers import PreTrainedModel
from transformers.loss import loss_utils
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lemo.models.memory.sharded import is_sharded, own_class

__all__ = [
    "check_adapters",
    "check_around",
    "check_attention",
    "check_not_compiled",
    "check_parts",
    "has_own_forward",
    "is_foreign",
    "is_intercepted",
    "kind_of",
    "makes_another_loss",
    "origin",
    "own_module",
    "parts_of_loss",
    "runs_foreign_code",
    "works_row_by_row",
]

_REMEDY = (
    "lemo runs the parts of a decoder layer itself, so this would not run. Undo it, use "
    "LemoConfig(path='generic'), or train without lemo"
)
# Libraries that put a rotation in place of Transformers' that computes the same.
_SAME_ROTATION = ("transformers", "liger_kernel")
# Those that put a forward in place of a causal LM's whose loss is the same.
_SAME_LOSS = ("transformers", "liger_kernel", "cut_cross_entropy", "trl")
# PEFT's kinds of adapters with scales, tasks or states for each token or sequence of the batch, or
# with weights that are means over its tokens, padding included (Lily).
_OF_THE_BATCH = ("LILY", "POLY", "SHADOW", "XLORA")
# Packages whose modules do to each token what they do to others, but for attention.
_LIBRARIES = ("accelerate", "awq", "bitsandbytes", "cut_cross_entropy", "gptqmodel", "lemo")
_LIBRARIES += ("liger_kernel", "optimum", "peft", "torch", "torchao", "transformers", "trl")
# Packages whose embeddings map each token by itself.
_ROW_BY_ROW = ("torch.nn.", "peft.tuners.", "peft.utils.", "bitsandbytes.", "transformers.")


def check_parts(decoder: nn.Module, config: Any, dropout_name: str) -> None:
    """Refuses a decoder whose layers or attention are not Transformers' own any more.

    Args:
        decoder: the stack of layers.
        config: the model's configuration.
        dropout_name: the attribute of attention that holds its dropout.

    Raises:
        ValueError: the decoder has hooks or a forward that was replaced; a layer or an attention
            module is of another class, or has hooks or a forward that was replaced; attention drops
            out or sees later tokens, or has another window than the configuration says; there are
            fewer layers than that says; an attention implementation or a rotation is neither
            Transformers' nor known to compute the same.
    """
    _check_decoder(decoder, config)
    for name, module in _parts(decoder):
        cls = own_class(module)
        own = cls.__module__.startswith("transformers.models.")
        if own and has_own_forward(cls) and not is_intercepted(module):
            continue
        if not own:
            what = f"a {cls.__module__}.{cls.__name__}"
        elif not has_own_forward(cls):
            what = f"one whose forward comes from {origin(cls.forward)}"
        elif "forward" in vars(module):
            what = "one whose forward was replaced"
        elif _foreign_hooks(module):
            what = f"one with a hook from {_foreign_hooks(module)[0]}"
        else:
            continue
        raise ValueError(
            f"model: expected {name} as Transformers defines it, got {what}; {_REMEDY}"
        )
    for index, layer in enumerate(decoder.layers):
        attention = own_module(own_module(layer).self_attn)
        share = getattr(attention, dropout_name)
        if share:
            raise ValueError(
                f"model: expected attention_dropout 0, got {share} in layer {index}; lemo's "
                "attention has no dropout, load the model with attention_dropout=0.0"
            )
        if not attention.is_causal:
            raise ValueError(
                f"model: expected causal attention, got is_causal=False in layer {index}"
            )
    _check_windows(decoder, config)
    if not getattr(config, "is_causal", True):
        raise ValueError("model: expected a causal model, got config.is_causal=False")
    attention = type(own_module(own_module(decoder.layers[0]).self_attn))
    _check_functions(attention, config._attn_implementation)


def _check_decoder(decoder: nn.Module, config: Any) -> None:
    check_not_compiled(decoder)
    name, forward = type(decoder).__name__, vars(decoder).get("forward")
    if not has_own_forward(type(decoder)):
        raise ValueError(
            f"model: expected {name}.forward as Transformers defines it, got one from "
            f"{origin(type(decoder).forward)}; {_REMEDY}"
        )
    what = None
    if forward is not None and not origin(forward).startswith("lemo."):
        what = f"one whose forward was replaced by one from {origin(forward)}"
    elif hooks := [hook for hook in _foreign_hooks(decoder) if not hook.startswith("lemo.")]:
        what = f"one with a hook from {hooks[0]}"
    if what is not None:
        raise ValueError(
            f"model: expected {name} as Transformers defines it, got {what}; {_REMEDY}"
        )
    if len(decoder.layers) < config.num_hidden_layers:
        raise ValueError(
            f"model: expected config.num_hidden_layers = {config.num_hidden_layers} layers, got "
            f"{len(decoder.layers)}"
        )


def _check_windows(decoder: nn.Module, config: Any) -> None:
    """Refuses layers that have another window than the mask that their model makes for them.

    The mask goes by a layer's place, its attention by the place that it was made for.
    """
    kinds = getattr(config, "layer_types", None)
    for index in range(config.num_hidden_layers if kinds else 0):
        attention = own_module(own_module(decoder.layers[index]).self_attn)
        if not hasattr(attention, "sliding_window"):
            continue
        kind = kinds[index] if index < len(kinds) else None
        window = config.sliding_window if kind == "sliding_attention" else None
        if kind is None or attention.sliding_window != window:
            raise ValueError(
                f"model: expected layer {index} to have the window that config.layer_types says, "
                f"{window} of '{kind}', got {attention.sliding_window}; where layers were taken "
                "out, repeated or put in another order, put config.layer_types in their order, too"
            )


def check_not_compiled(module: nn.Module) -> None:
    """Refuses a part of a model around which `torch.compile` has put a module.

    Raises:
        ValueError: `module` is what it has put there.
    """
    inside = own_module(module)
    if inside is not module:
        raise ValueError(
            f"model: expected {type(inside).__name__}, got what torch.compile made of it; compile "
            "its layers one by one, by layer.compile(), or the model as a whole"
        )


def check_around(model: nn.Module, causal_lm: nn.Module) -> None:
    """Refuses what stands around a causal LM and would run beside lemo, or break in the middle.

    Args:
        model: what the user has, such as PEFT's wrapper.
        causal_lm: the model inside.

    Raises:
        ValueError: a wrapper has taken the causal LM's forward before lemo; there is another causal
            LM beside it; or see `check_adapters`.
    """
    inside = set(causal_lm.modules())
    for module in model.modules():
        beside = module not in inside and all(part is not causal_lm for part in module.modules())
        if beside and isinstance(module, PreTrainedModel) and module.can_generate():
            raise ValueError(
                f"model: expected one causal LM inside {type(model).__name__}, got a "
                f"{type(causal_lm).__name__} and a {type(module).__name__}, such as a student and "
                "its teacher; call lemo.enable on the one that is trained"
            )
        held = getattr(vars(module).get("forward"), "__self__", None)
        if module is not causal_lm and held is causal_lm:
            raise ValueError(
                f"model: {type(module).__name__} calls the forward that {type(causal_lm).__name__} "
                "had when it was wrapped, so lemo would never run; call lemo.enable on the model "
                "first, and wrap it then"
            )
        check_adapters(module)


def check_adapters(module: nn.Module) -> None:
    """Refuses PEFT's adapters that know the batch, of which lemo's layers get some rows.

    Asked for the causal LM in every pass, since adapters may come after `lemo.enable`.

    Args:
        module: what PEFT has put adapters into, or its wrapper.

    Raises:
        ValueError: one of them looks for words (aLoRA), or holds something for each token or
            sequence (X-LoRA, Poly, Shadow) or for all tokens together (Lily), active or not.
    """
    configs = vars(module).get("peft_config")
    for config in configs.values() if isinstance(configs, dict) else ():
        kind = getattr(config, "peft_type", None)
        if str(getattr(kind, "value", kind)) in _OF_THE_BATCH:
            raise ValueError(
                "peft_type: expected adapters that do the same to every token, got "
                f"{type(config).__name__}, which holds something for each token or sequence of the "
                "batch, or for all of its tokens, of which lemo leaves rows out; train without lemo"
            )
        if getattr(config, "alora_invocation_tokens", None):
            raise ValueError(
                "alora_invocation_tokens: expected None, since aLoRA begins where these tokens "
                "stand in the batch, of which lemo leaves rows out, got "
                f"{config.alora_invocation_tokens}"
            )


def is_intercepted(module: nn.Module) -> bool:
    """Whether calling `module` does more than its class's forward: hooks, a replaced forward."""
    # Asked for hundreds of modules in every pass.
    of = module.__dict__
    return bool(
        of["_forward_hooks"]
        or of["_forward_pre_hooks"]
        or of["_backward_hooks"]
        or of["_backward_pre_hooks"]
        or "forward" in of
        or _hooks_of_all()
    )


def _hooks_of_all() -> list[object]:
    """Hooks on every module there is, by `torch.nn.modules.module`, but for torch's own, which only
    watch."""
    kinds = (
        of_all_modules._global_forward_hooks,
        of_all_modules._global_forward_pre_hooks,
        of_all_modules._global_backward_hooks,
        of_all_modules._global_backward_pre_hooks,
    )
    # Asked a thousand times in a pass.
    if not any(kinds):
        return []
    hooks = chain.from_iterable(kind.values() for kind in kinds)
    return [hook for hook in hooks if not origin(hook).startswith("torch.")]


@functools.cache
def _is_own(forward: object, cls: type) -> bool:
    cls = next(base for base in cls.__mro__ if "forward" in vars(base))
    home = Path(sys.modules[cls.__module__].__file__)
    library = Path(sys.modules[cls.__module__.partition(".")[0]].__file__).parent
    codes = [getattr(f, "__code__", None) for f in (forward, inspect.unwrap(forward))]
    if None in codes:
        return False
    outer, inner = (Path(code.co_filename) for code in codes)
    return inner == home and outer.is_relative_to(library)


def has_own_forward(cls: type) -> bool:
    """Whether a class's forward was written with the class, under its library's decorators only."""
    return _is_own(cls.forward, cls)


def is_foreign(module: nn.Module) -> bool:
    """Whether a module's code, or what was put in place of its forward, is of no known library."""
    cls, replaced = own_class(module), vars(module).get("forward")
    if replaced is not None and not _of_library(origin(replaced)):
        return True
    return not _is_of_library(cls, cls.forward)


def runs_foreign_code(module: nn.Module) -> bool:
    """Whether calling `module` runs code of no known library: its own, or a hook's around it."""
    if is_foreign(module):
        return True
    if not is_intercepted(module):
        return False
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return not all(_of_library(origin(hook)) for hook in hooks)


@functools.cache
def _is_of_library(cls: type, forward: object) -> bool:
    return _of_library(cls.__module__) and _of_library(origin(forward))


def _of_library(name: str) -> bool:
    return name.partition(".")[0] in _LIBRARIES


def makes_another_loss(causal_lm: nn.Module, replaced: object = None) -> str | None:
    """Where another loss or other logits than Transformers' come from; None: there are none.

    Args:
        causal_lm: has `loss_function`, as Transformers' have.
        replaced: a forward of the instance, which runs in place of the class's; None: there is
            none.
    """
    cls: type = own_class(causal_lm)
    if replaced is None:
        of_transformers = cls.__module__.startswith("transformers.models.")
        replaced = None if of_transformers and has_own_forward(cls) else cls.forward
    found = None if replaced is None else origin(replaced)
    if found is not None and found.partition(".")[0] not in _SAME_LOSS:
        return found
    loss: object = causal_lm.loss_function
    if loss is not ForCausalLMLoss:
        return origin(loss)
    origins = map(origin, parts_of_loss())
    same = ("torch", *_SAME_LOSS)
    return next((found for found in origins if found.partition(".")[0] not in same), None)


def parts_of_loss() -> tuple[object, ...]:
    """The functions that Transformers' loss looks up when it runs."""
    return loss_utils.fixed_cross_entropy, nn.functional.cross_entropy


def own_module(module: nn.Module) -> nn.Module:
    """The module inside what `torch.compile(module)` returns; others are returned as they are."""
    # Asked for every layer of every pass; a module's own getattr is slow where there is none.
    return module._modules.get("_orig_mod", module)


def _parts(decoder: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for index, layer in decoder.layers._modules.items():
        layer = own_module(layer)
        yield f"layers.{index}", layer
        yield f"layers.{index}.self_attn", own_module(layer._modules["self_attn"])


def _foreign_hooks(module: nn.Module) -> list[str]:
    """Where hooks on a module, or on all, come from, without those that record Transformers' own
    outputs."""
    hooks = (
        *module._forward_hooks.values(),
        *module._forward_pre_hooks.values(),
        *module._backward_hooks.values(),
        *module._backward_pre_hooks.values(),
    )
    origins = map(origin, (*hooks, *_hooks_of_all()))
    own = ("transformers", "torch.distributed.fsdp") if is_sharded(module) else ("transformers",)
    return [origin for origin in origins if not origin.startswith(own)]


def _check_functions(attention: type, attention_name: str) -> None:
    """The functions that an attention class of Transformers looks up when it runs."""
    home = sys.modules[attention.__module__]
    function = ALL_ATTENTION_FUNCTIONS.get(attention_name)
    if attention_name == "eager":
        function = home.eager_attention_forward
    # Attention of the hub ("owner/name") computes what Transformers' own computes.
    if function is not None or "/" not in attention_name:
        check_attention(function, attention_name)
    rotation = getattr(home, "apply_rotary_pos_emb", None)
    foreign = None if rotation is None else _foreign_code(rotation, _SAME_ROTATION)
    if foreign is not None:
        raise ValueError(
            f"model: expected the rotation of {attention.__module__}, got one from {foreign}; "
            f"{_REMEDY}"
        )


def check_attention(function: object, name: str) -> None:
    """Refuses attention of the user's own, in whose place lemo's would be wrong silently.

    Args:
        function: computes it.
        name: of the implementation.

    Raises:
        ValueError: it is neither Transformers' nor lemo's, or calls what is not.
    """
    foreign = _foreign_code(function, ("transformers", "lemo"))
    if foreign is not None:
        raise ValueError(
            f"attn_implementation: expected one of Transformers' own, got '{name}' from "
            f"{foreign}, in whose place lemo's attention would run. Load the model with "
            "attn_implementation='sdpa', or train without lemo"
        )


def _foreign_code(function: Any, libraries: tuple[str, ...]) -> str | None:
    """Where a function comes from, or one of its module that it calls; None: known libraries."""
    names = getattr(getattr(function, "__code__", None), "co_names", ())
    called = (function.__globals__.get(name) for name in names)
    origins = map(origin, (function, *filter(inspect.isfunction, called)))
    known = (*libraries, "torch")
    return next((found for found in origins if found.partition(".")[0] not in known), None)


def kind_of(part: object) -> str:
    """The class of a module or a tensor, in words."""
    cls = type(part)
    return f"a {cls.__module__}.{cls.__name__}"


def origin(function: object) -> str:
    """The module in which a function was defined, whatever `functools.wraps` copied."""
    function = getattr(function, "__func__", function)
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(function, "__code__", None)
    if code is None:
        return f"{type(function).__module__}.{type(function).__name__}"
    # Code of a notebook is in no module's file, and `__module__` may have been copied.
    return _module_of(code.co_filename) or str(function.__globals__.get("__name__"))


@functools.cache
def _module_of(file: str) -> str | None:
    modules = list(sys.modules.items())
    return next((name for name, m in modules if getattr(m, "__file__", None) == file), None)


def works_row_by_row(module: nn.Module) -> bool:
    """Whether nothing in a part of the embedding may look at more than one token.

    Known is what torch, PEFT, bitsandbytes and Transformers wrote, without anybody's hook. The hook
    by which checkpointing makes embedded tokens require a gradient is harmless.
    """
    cls = own_class(module)
    if not cls.__module__.startswith(_ROW_BY_ROW) or not has_own_forward(cls):
        return False
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    harmless = "make_inputs_require_grad", "make_inputs_require_grads"
    known = all(getattr(hook, "__name__", "") in harmless for hook in (*hooks, *_hooks_of_all()))
    return known and "forward" not in vars(module)
