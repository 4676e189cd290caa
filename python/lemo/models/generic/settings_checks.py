"""Settings that the generic path has no use for."""

from typing import Any

from lemo.settings.elimination import LayerwiseConfig, LemoConfig

__all__ = ["check_settings"]


def check_settings(model: str, config: LemoConfig) -> None:
    """Raises ValueError where settings ask for what needs the inside of layers.

    Args:
        model: the class of the model.
        config: the settings.
    """
    asked: list[tuple[str, Any, str]] = []
    if config.scorer not in ("auto", "random", "lexical", "given"):
        asked.append(("scorer", config.scorer, "auto, random, lexical or given"))
    if config.visible_keys != "kept":
        asked.append(("visible_keys", config.visible_keys, "kept"))
    if config.mask_loss is False:
        asked.append(("mask_loss", False, "true"))
    if config.recompute not in ("auto", "none"):
        what = "auto; model.gradient_checkpointing_enable() recomputes"
        asked.append(("recompute", config.recompute, what))
    if config.host_memory and config.offload == "auto":
        asked.append(
            ("offload", "auto", "a share of each layer, or one for each, with host_memory")
        )
    if (config.head_groups or 1) > 1:
        asked.append(("head_groups", config.head_groups, "null or 1"))
    layerwise = config.layerwise
    plain = LayerwiseConfig(keep_schedule=layerwise.keep_schedule, group_size=layerwise.group_size)
    for name, default in plain:
        got = getattr(layerwise, name)
        if got != default:
            asked.append((f"layerwise.{name}", got, f"{default}, one kept set for all layers"))
    for name, got, expected in asked:
        raise ValueError(
            f"{name}: expected {expected} in the generic path, which runs the layers of {model} as "
            f"they are, got {got}"
        )
