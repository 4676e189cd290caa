"""Settings at work on a model: where scores come from, what is kept, and how layers run."""

from lemo.distributed.context import ContextParallel
from lemo.models.calls.context_checks import check_settings
from lemo.models.layers.architectures import Architecture
from lemo.models.layers.cuda_graphs import CudaGraphs
from lemo.models.layers.decoder import Decoder
from lemo.models.layers.modes import Modes
from lemo.models.layers.scout import Scout
from lemo.models.memory.offload import Offload
from lemo.selection.scorers import Scorer, make_scorer
from lemo.selection.selector import Selector
from lemo.settings.elimination import LemoConfig

__all__ = ["Choice", "Elimination"]


class Choice:
    """How the blocks of one kind of batch, text or prompts with answers, are chosen.

    Attributes:
        config: the settings, none left open, with what the scorer's predictors say.
        scorer: where block scores come from.
        block_size: tokens of a block, or their share of a batch's longest sequence.
        selector: what each sub-block keeps.
    """

    def __init__(self, config: LemoConfig, num_layers: int, scorer: Scorer) -> None:
        self.config = config.of_predictors(scorer.block_size, scorer.thresholds)
        assert self.config.block_size is not None
        self.scorer = scorer
        self.block_size = self.config.block_size
        self.selector = Selector(self.config, num_layers)


class Elimination(Choice):
    """What the settings of one kind of batch ask for.

    Attributes:
        decoder: the layers, for a loss alone.
        dense_decoder: the layers where each row has to be what the dense model gives; gradients
            come from the kept rows.
    """

    def __init__(
        self,
        architecture: Architecture,
        context: ContextParallel | None,
        offload: Offload,
        graphs: CudaGraphs | None,
        config: LemoConfig,
    ) -> None:
        scorer = make_scorer(config, architecture, Scout(architecture))
        super().__init__(config, architecture.num_layers, scorer)
        config = self.config
        if context is not None:
            check_settings(config, self.selector)
        parts = architecture, self.selector, self.scorer
        self.decoder = Decoder(
            *parts,
            Modes(architecture, config, config.visible_keys, alone=context is None, graphs=graphs),
            offload,
            visible_keys=config.visible_keys,
            group_size=config.layerwise.group_size or 0,
            context=context,
        )
        everything = "computed"
        modes = Modes(architecture, config, everything, graphs=graphs)
        self.dense_decoder = Decoder(*parts, modes, offload, visible_keys=everything)
