"""The policies of a config, resolved for the layers of a model."""

from typing import NamedTuple

from lemo.settings.elimination import LemoConfig

__all__ = ["Policies", "Rule"]


class Rule(NamedTuple):
    """How a sub-block chooses blocks by their scores; see `lemo.ops.token_select`.

    Attributes:
        policy: "ratio" or "threshold".
        value: the share of blocks, or the lowest score.
    """

    policy: str
    value: float


class Policies:
    """By which rule each sub-block chooses its blocks, and by the scores of which layer.

    Attributes:
        dense_layers: layers that keep everything, counted from 0.
        mlp_shares: whether the MLP of every layer keeps what its attention keeps.
        sources: for each layer, the layer whose scores it uses; a dense layer uses none.
    """

    def __init__(self, config: LemoConfig, num_layers: int) -> None:
        """Resolves the settings that may differ from layer to layer.

        Args:
            config: the settings, resolved.
            num_layers: layers of the model.

        Raises:
            ValueError: a list without one entry for each layer, a layer that does not exist, a
                layer that eliminates before any layer has chosen a set, or nothing kept anywhere.
        """
        self._layerwise = layerwise = config.layerwise
        self._num_layers = num_layers
        self.dense_layers = frozenset(
            _indices("layerwise.dense_layers", layerwise.dense_layers, num_layers)
        )
        keep = config.keep if layerwise.keep is None else layerwise.keep
        assert keep is not None, "settings that are resolved leave nothing open"
        keep_mlp = keep if layerwise.keep_mlp is None else layerwise.keep_mlp
        self._keep = {
            "attention": _per_layer("layerwise.keep", keep, num_layers),
            "mlp": _per_layer("layerwise.keep_mlp", keep_mlp, num_layers),
        }
        self._thresholds: dict[str, list[float]] = {}
        if layerwise.policy == "threshold":
            self._thresholds = self._resolve_thresholds()
            self.mlp_shares = "mlp" not in self._thresholds
        else:
            self.mlp_shares = layerwise.keep_mlp is None
        self.sources = self._resolve_sources()
        self._check_keeps_something()

    def _resolve_thresholds(self) -> dict[str, list[float]]:
        attention, mlp = self._layerwise.thresholds, self._layerwise.mlp_thresholds
        if attention is None:
            raise ValueError(
                "layerwise.thresholds: policy 'threshold' needs one for each layer, got null, and "
                "the predictor folder has none either"
            )
        thresholds = {"attention": _per_layer("layerwise.thresholds", attention, self._num_layers)}
        if mlp is not None:
            thresholds["mlp"] = _per_layer("layerwise.mlp_thresholds", mlp, self._num_layers)
        return thresholds

    def _resolve_sources(self) -> list[int]:
        select_at = self._layerwise.select_at
        eliminating = [i for i in range(self._num_layers) if i not in self.dense_layers]
        match select_at:
            case "first":
                scoring = eliminating[:1]
            case "all":
                scoring = eliminating
            case layers:
                scoring = sorted(_indices("layerwise.select_at", layers, self._num_layers))
        sources: list[int] = []
        for layer in range(self._num_layers):
            earlier = [source for source in scoring if source <= layer]
            sources.append(earlier[-1] if earlier else layer)
            if not earlier and layer not in self.dense_layers:
                raise ValueError(
                    f"layerwise.select_at: layer {layer} is not dense, so expected a layer <= "
                    f"{layer} that chooses a set, got {list(select_at)}"
                )
        return sources

    def _check_keeps_something(self) -> None:
        """Checks the settings; `Selector.check_kept` checks what a forward pass has kept."""
        shares = [share for kind in self._keep.values() for share in kind]
        shares += [keep for _, keep in self._layerwise.keep_schedule]
        if self._layerwise.policy == "ratio" and not self.dense_layers and not any(shares):
            raise ValueError(
                "keep: expected more than 0 in some layer, got 0 everywhere, so nothing would be "
                "trained"
            )

    def rule(self, layer: int, kind: str, progress: float) -> Rule | None:
        """How a sub-block chooses at this progress of the training; None: it keeps everything."""
        if layer in self.dense_layers:
            return None
        keep = self._scheduled_keep(progress)
        if keep is None and self._layerwise.policy == "threshold":
            # Scores of different layers are on different scales: the layer that scored decides.
            return Rule("threshold", self._thresholds[kind][self.sources[layer]])
        if keep is None:
            keep = self._keep[kind][layer]
        return None if keep == 1.0 else Rule("ratio", keep)

    @property
    def moments(self) -> tuple[float, ...]:
        """From which progress of the training on other rules may hold, ascending."""
        return 0.0, *(begin for begin, _ in self._layerwise.keep_schedule)

    @property
    def always_has_one_set(self) -> bool:
        """Whether all sub-blocks keep the same rows at every progress of the training."""
        return all(map(self.has_one_set, self.moments))

    def has_one_set(self, progress: float) -> bool:
        """Whether all sub-blocks choose by the same rule and by the same scores."""
        rules = {
            (self.sources[layer], self.rule(layer, "attention", progress))
            for layer in range(self._num_layers)
        }
        return self.mlp_shares and len(rules) == 1

    def needs_scores_of(self, layer: int, kind: str, progress: float) -> bool:
        """Whether some sub-block of this kind chooses by the scores of `layer`."""
        return any(
            source == layer and self.rule(user, kind, progress) is not None
            for user, source in enumerate(self.sources)
        )

    def _scheduled_keep(self, progress: float) -> float | None:
        due = [keep for begin, keep in self._layerwise.keep_schedule if progress >= begin]
        return due[-1] if due else None


def _per_layer(name: str, value: float | tuple[float, ...], num_layers: int) -> list[float]:
    values = list(value) if isinstance(value, tuple) else [value] * num_layers
    if len(values) != num_layers:
        raise ValueError(
            f"{name}: expected {num_layers} entries, one for each layer, got {len(values)}"
        )
    return values


def _indices(name: str, layers: tuple[int, ...], num_layers: int) -> set[int]:
    for layer in layers:
        if not -num_layers <= layer < num_layers:
            raise ValueError(
                f"{name}: expected layers between {-num_layers} and {num_layers - 1}, got {layer}"
            )
    return {layer % num_layers for layer in layers}
