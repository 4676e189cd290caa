"""What is to be planned: a model, its adapters and the settings, for any length of a sequence."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lemo.planner.memory import MODES, StepMemory
from lemo.planner.plan import DoesNotFitError, GraphRules, HostRules, Planner, longest_that_fits
from lemo.planner.rows import drops_rows, embeds_all, has_one_set, rows_of, selections
from lemo.planner.shape import LINEAR, Adapters, ModelShape, step_of
from lemo.planner.text import bytes_text, needed_text
from lemo.planner.timing import Rates, StepTime
from lemo.settings.base import MOST
from lemo.settings.elimination import LemoConfig

__all__ = ["Request", "adapters_of"]

# Shares of the tokens that are proposed where a step does not fit.
_KEEPS = 32
# GiB of the host that are proposed at most.
_MOST_HOST = 1024


def adapters_of(
    rank: int, targets: tuple[str, ...] | None, dropout: bool = False, norms: bool = False
) -> Adapters:
    """LoRA in fp32, as `lemo finetune` makes it.

    Args:
        rank: of every pair.
        targets: names of the adapted layers; None: all linear ones of the decoder.
        dropout: whether inputs are dropped out.
        norms: whether norms are trained.

    Raises:
        ValueError: a target whose bytes are not known.
    """
    for name in targets or ():
        if name not in LINEAR:
            raise ValueError(
                f"lora_targets: expected some of {', '.join(LINEAR)}, whose memory can be "
                f"predicted, got '{name}'"
            )
    return Adapters(rank, frozenset(targets or LINEAR), dropout=dropout, norms=norms)


@dataclass(frozen=True)
class Request:
    """A step whose length is open.

    Attributes:
        shape: the model.
        adapters: LoRA on it.
        elimination: the settings, none left open.
        rates: of the machine.
        batch: sequences of a forward pass.
        size: bytes of a number of weights and activations.
        autocast: whether autocast is on.
        cuda: whether it runs on a GPU.
        passes: forward passes of an optimizer step.
        quantize: how weights are stored.
        window: tokens that attention sees back; 0: all.
        processes: that share out the kept rows of each batch (context parallelism).
        shards: processes over which weights are cut (FSDP2).
        may_shard: whether a run cuts weights of its dtype.
    """

    shape: ModelShape
    adapters: Adapters
    elimination: LemoConfig
    rates: Rates
    batch: int = 1
    size: int = 2
    autocast: bool = True
    cuda: bool = True
    passes: int = 1
    quantize: str | None = None
    window: int = 0
    processes: int = 1
    shards: int = 1
    may_shard: bool = True

    def planner(self, tokens: int) -> Planner:
        """Plans the step with sequences of so many tokens.

        Raises:
            ValueError: settings whose memory cannot be predicted, see `rows_of`.
        """
        layers, lengths = self.shape.layers, [tokens] * self.batch
        group = self.elimination.layerwise.group_size or 0
        drops = drops_rows(self.elimination, layers)
        step = step_of(
            self.shape,
            lengths,
            rows_of(self.elimination, layers, lengths),
            drops=drops,
            all_count=not drops,
            size=self.size,
            autocast=self.autocast,
            cuda=self.cuda,
            passes=self.passes,
            loss_chunk=self.elimination.loss_chunk,
            head_groups=self.elimination.head_groups,
            shifted=group > 0,
            embeds_all=embeds_all(self.elimination),
            selections=selections(self.elimination, layers),
        )
        if self.processes > 1:
            step = step.shared_out(self.processes)
        step = replace(step, shards=self.shards)
        fp8 = self.elimination.in_8_bits
        memory = StepMemory(self.shape, self.adapters, step, self.quantize, fp8)
        more = self.window, group, fp8, self.quantize
        time = StepTime(self.shape, self.adapters, step, self.rates, *more)
        host = HostRules(self.elimination.host_bytes, self.elimination.offload_shares(layers))
        graphs = None
        captured = has_one_set(self.elimination, layers) and self.processes == self.shards == 1
        if captured and self.elimination.cuda_graphs != "off":
            graphs = GraphRules(self.elimination.cuda_graphs == "on")
        return Planner(memory, time, host=host, graphs=graphs)

    @property
    def modes(self) -> tuple[str, ...] | None:
        """The setting `recompute` of each layer; None: auto."""
        if self.elimination.recompute == "auto":
            return None
        return self.elimination.recompute_modes(self.shape.layers)

    def longest(self, limit: int) -> int:
        """The most tokens of a sequence that fit into so many bytes, with what the settings
        recompute; 0: not even 16."""
        return longest_that_fits(lambda tokens: self._fits(self, tokens, limit), MOST // self.batch)

    def check_host(self, tokens: int) -> None:
        """Raises DoesNotFitError where the host is too small for what `offload` moves there."""
        elimination = self.elimination
        if not elimination.moves:
            return
        modes = self.modes or [MODES[-1]] * self.shape.layers
        needed = self.planner(tokens).of(modes, 0).host
        if needed > elimination.host_bytes:
            raise DoesNotFitError(
                f"elimination.host_memory: expected {needed_text(needed)} or more for offload "
                f"{elimination.offload}, got {bytes_text(elimination.host_bytes)}"
            )

    def advice(self, tokens: int, limit: int) -> str:
        """What would make a step fit that does not, each with the other settings as they are."""
        planner = self.planner(tokens)
        ways = [f"{needed_text(planner.least(self.modes))} of memory"]
        if self.modes is not None and planner.fits(limit):
            ways.append("recompute auto")
        longest = self.longest(limit)
        if longest:
            ways.append(f"at most {longest} tokens")
        keep = self._largest_keep(tokens, limit)
        if keep is not None:
            ways.append(f"keep {keep:g} or less, with blocks of 64 tokens")
        host = self._least_host(tokens, limit)
        if host is not None:
            ways.append(f"{host} GiB of the host for activations (host_memory {host})")
        if self.batch > 1 and self._fits(replace(self, batch=1), tokens, limit):
            ways.append("one sequence at a time (batch size 1)")
        can_quantise = self.quantize is None and self.size == 2
        can_quantise = can_quantise and self.elimination.products == "dtype"
        if can_quantise and self._fits(replace(self, quantize="nf4"), tokens, limit):
            ways.append("weights in 4 bits (quantize nf4)")
        return "; ".join(ways)

    def _largest_keep(self, tokens: int, limit: int) -> float | None:
        """The largest share, in steps of 1/32 below the one of the settings, that fits."""
        for parts in range(_KEEPS - 1, 0, -1):
            keep = parts / _KEEPS
            if self.elimination.keep is not None and keep >= self.elimination.keep:
                continue
            changed = self.elimination.model_copy(update={"keep": keep, "block_size": 64})
            if self._fits(replace(self, elimination=changed), tokens, limit):
                return keep
        return None

    def _least_host(self, tokens: int, limit: int) -> int | None:
        """The fewest GiB of the host, more than the settings have, with which the step fits."""
        if self.elimination.offload != "auto" or not self.cuda:
            return None

        def fits(host: int) -> bool:
            changed = self.elimination.model_copy(update={"host_memory": float(host)})
            return self._fits(replace(self, elimination=changed), tokens, limit)

        too_little, host = int(self.elimination.host_memory), 1
        while not (host > too_little and fits(host)):
            too_little, host = max(too_little, host), 2 * host
            if host > _MOST_HOST:
                return None
        while host - too_little > 1:
            middle = (too_little + host) // 2
            if fits(middle):
                host = middle
            else:
                too_little = middle
        return host

    @staticmethod
    def _fits(request: Request, tokens: int, limit: int) -> bool:
        return request.planner(tokens).fits(limit, request.modes)
