"""Settings and calls that context parallelism refuses (docs/MULTI_GPU.md)."""

from lemo.models.calls.arguments import ForwardArguments
from lemo.selection.selector import Selector
from lemo.settings.elimination import LemoConfig

__all__ = ["check_call", "check_settings", "needs_all_rows"]


def check_settings(config: LemoConfig, selector: Selector) -> None:
    """Refuses settings for which rows cannot be shared out.

    Raises:
        NotImplementedError: the message names the setting.
    """
    refused = None
    if config.visible_keys == "all":
        refused = "visible_keys: expected 'kept' or 'computed' with context_parallel, got 'all'"
    elif config.layerwise.group_size is not None:
        refused = (
            "layerwise.group_size: expected null with context_parallel, where heads are gathered "
            f"in parts, got {config.layerwise.group_size}"
        )
    elif (config.head_groups or 1) > 1:
        refused = (
            "head_groups: expected null or 1 with context_parallel, where heads are gathered in "
            f"parts, got {config.head_groups}"
        )
    elif not selector.always_has_one_set:
        refused = (
            "layerwise: expected one kept set for all layers with context_parallel, got settings "
            "(keep, keep_mlp, thresholds, dense_layers, select_at) by which sets differ"
        )
    if refused is not None:
        raise NotImplementedError(refused)


def check_call(arguments: ForwardArguments) -> None:
    """Refuses a call with labels whose gradients would be those of this process's rows alone.

    Raises:
        NotImplementedError: the message names the argument.
    """
    embedded = arguments.inputs_embeds
    if embedded is not None and embedded.requires_grad:
        raise NotImplementedError(
            "inputs_embeds: expected embeddings without a gradient with context_parallel, where "
            "each process has that of its own rows only, got some that require one; pass input_ids"
        )


def needs_all_rows(what: str) -> NotImplementedError:
    """The error for what a process that has a share of the rows cannot give.

    Args:
        what: was asked for.
    """
    return NotImplementedError(
        f"{what}: not available with context_parallel, where each process has its own rows only; "
        "pass `labels` to the model, and let it compute the loss"
    )
