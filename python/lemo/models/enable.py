"""lemo.enable: token elimination in the training forward pass of a Hugging Face causal LM."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutputWithPast, ModelOutput

from lemo.models import labels as named_labels
from lemo.models.architectures import Architecture, architecture_of
from lemo.models.arguments import CACHES, check_arguments, wants_hidden_states
from lemo.models.decoder import Decoder
from lemo.models.forward import ReplacedForward
from lemo.models.loss import IGNORE_INDEX, causal_lm_loss, next_labels
from lemo.models.outputs import DeferredLogits, EliminatedOutput
from lemo.models.verify import verify
from lemo.packing.batch import PackedBatch
from lemo.selection.scorers import make_scorer
from lemo.selection.selector import Selector
from lemo.selection.statistics import LayerStatistics
from lemo.settings.elimination import LemoConfig

__all__ = ["Handle", "enable"]

_ATTRIBUTE = "_lemo_handle"

_LABELS_UNKNOWN = (
    ", chosen without regard to labels, because nobody named them: pass `labels` to the model, or "
    "use handle.labelled(mask) or handle.attach(trainer)"
)


def enable(model: "nn.Module | transformers.Trainer", config: LemoConfig | None = None) -> "Handle":
    """Makes the training forward pass of `model` eliminate tokens, until `handle.remove()`.

    Replaces `forward` on two instances, the causal LM and its decoder; classes stay as they are. It
    acts while the model is in training mode, gradients are enabled and no key-value cache is used;
    otherwise the model's own forward runs. PEFT may wrap the model before or after, a trainer may
    be made before or after; `Accelerator.prepare` comes after.

    Where the model gets `labels`, it computes the loss in segments, from the labels of rows that
    take part; `logits` are computed when they are read. Where logits or hidden states are asked
    for, each of their rows is what the dense model gives: rows that are not kept are computed, too,
    without a graph, and gradients come from the kept rows. Blocks that have labels are kept first;
    which these are is known from `labels`, from `Handle.labelled`, or from a trainer's batches.

    Args:
        model: a causal LM (Llama, Mistral, Qwen2, Qwen3, OPT), possibly wrapped by PEFT; or the
            `transformers.Trainer` of one (TRL's are such), see `Handle.attach`.
        config: the settings; None: the defaults.

    Returns:
        The handle that drives the schedule, tells what was kept, and undoes it all.

    Raises:
        TypeError: `model` holds no supported causal LM, or `config` is no LemoConfig.
        ValueError: lemo is enabled already, Accelerate has prepared the model, layers or attention
            are not Transformers' own, the model uses attention dropout or another unsupported
            setting, or `config` does not fit the model (for example a list without one entry for
            each layer).
    """
    config = LemoConfig() if config is None else config
    if not isinstance(config, LemoConfig):
        raise TypeError(f"config: expected a LemoConfig, got {type(config).__name__}")
    if isinstance(model, transformers.Trainer):
        handle = enable(model.model, config)
        handle.attach(model)
        return handle
    architecture = architecture_of(model)
    for module in (architecture.causal_lm, architecture.decoder):
        if hasattr(module, _ATTRIBUTE):
            raise ValueError("model: lemo is already enabled on it; call handle.remove() first")
        prepared = hasattr(module, "_original_forward")  # by Accelerate
        if prepared or (module is architecture.decoder and "forward" in vars(module)):
            raise ValueError(
                f"model: expected {type(module).__name__} with the forward of its class, got one "
                "replaced on the instance; call lemo.enable before Accelerator.prepare and the like"
            )
    architecture.check_supported()
    return Handle(architecture, config, model)


class Handle:
    """Token elimination on one model; made by `lemo.enable`.

    Attributes:
        config: the settings.
        block_size: tokens of a block, or their share of a batch's longest sequence: that of
            `config`, or that of the predictors where it leaves the choice to them.
        row_labels: [B, S] bool, rows that predict a label, in the forward pass that runs; None:
            nothing is known.
    """

    def __init__(self, architecture: Architecture, config: LemoConfig, model: nn.Module) -> None:
        self.config = config
        self.row_labels: Tensor | None = None
        self._architecture = architecture
        self._scorer = make_scorer(config, architecture)
        self.block_size = self._scorer.block_size or config.block_size
        self._selector = Selector(config, architecture.num_layers, self._scorer.thresholds)
        parts = architecture, self._selector, self._scorer
        self._decoder = Decoder(
            *parts,
            visible_keys=config.visible_keys,
            group_size=config.group_size or 0,
            recompute=config.recompute,
        )
        # Each row of it is what the dense model gives; gradients come from the kept rows.
        self._dense_decoder = Decoder(*parts, visible_keys="computed", recompute=config.recompute)
        self._has_trained = False
        self._said: set[str] = set()
        self._installed = [
            ReplacedForward(architecture.causal_lm, self, _causal_lm_forward),
            ReplacedForward(architecture.decoder, self, _decoder_forward),
        ]
        for forward in self._installed:
            setattr(forward.__self__, _ATTRIBUTE, self)
        # Trainers call what they were given, and may replace the forward further inside.
        self._watcher = named_labels.Watcher(self)
        self._undo: list[Callable[[], None]] = []
        self._detach: list[Callable[[], None]] = []
        self.watch(model)

    @property
    def causal_lm(self) -> nn.Module:
        """The model whose forward is replaced, without what wraps it."""
        return self._architecture.causal_lm

    def remove(self) -> None:
        """Gives the model its own forward back; does nothing when called again.

        Where somebody wrapped the forward since (a trainer, Accelerate's mixed precision), the
        wrapper stays, around the model's own forward.
        """
        for forward in self._installed:
            forward.release()
            delattr(forward.__self__, _ATTRIBUTE)
        for undo in (*self._undo, *self._detach):
            undo()
        self._installed, self._undo, self._detach = [], [], []

    def __getstate__(self) -> dict[str, Any]:
        # A copied or pickled model has no trainer.
        return vars(self) | {"_detach": []}

    def attach(self, trainer: "transformers.Trainer") -> None:
        """Adds `lemo.TrainerCallback`, and names the labels of each of the trainer's batches.

        So that blocks with labels are kept first also where the model does not get them: with label
        smoothing, a loss function of one's own, or a trainer's own loss.

        Args:
            trainer: one of this handle's model, Transformers' or made on it, such as TRL's.

        Raises:
            TypeError: it is no trainer.
            ValueError: it trains another model.
        """
        from lemo.models.callback import attach

        self._detach.append(attach(trainer, self))

    def watch(self, module: nn.Module) -> Callable[[], None]:
        """Takes the `labels` of every call of `module` for the labels of what runs inside.

        For modules around the model, such as DDP's; `model` itself is watched from the beginning.

        Returns:
            What ends it; `remove` does, too.
        """
        undo = self._watcher.watch(module)
        self._undo.append(undo)
        return undo

    def verify(self, batch: Mapping[str, Any], tokens: int = 512) -> None:
        """Checks keep = 1 against the model's own forward on the beginning of a batch.

        Loss and gradients of the trainable parameters must agree to rounding. Call it once, with
        the first batch: it finds whatever makes the model compute something else than lemo takes it
        for. Gradients and random numbers stay as they are.

        Args:
            batch: what the model is called with: input_ids [B, S], and attention_mask,
                position_ids and labels [B, S] where there are any.
            tokens: how many tokens of its first sequence to use.

        Raises:
            ValueError: they differ; the message says by how much, and in which layer first. Or the
                batch cannot be used.
        """
        verify(self._architecture, self._selector, self._loss, self._states, batch, tokens)

    def loss(self, **arguments: Any) -> Tensor:
        """The loss that a training forward gives, fp32 scalar, in whatever mode the model is.

        With gradients off, too, where the model's own forward runs otherwise.

        Args:
            arguments: as the model takes them, with `labels`.
        """
        return self._loss(arguments).loss

    @contextmanager
    def labelled(self, mask: Tensor) -> Iterator[None]:
        """Names the tokens whose prediction the loss counts, for forward passes without `labels`.

            with handle.labelled(completion_mask):
                logits = model(input_ids).logits

        Args:
            mask: [B, S] of bool or 0/1, set where `labels` would not be -100. Blocks from which
                these tokens are predicted are kept before the others.

        Raises:
            ValueError: not two-dimensional; from the forward pass: not one for each token.
        """
        if mask.ndim != 2:
            raise ValueError(f"mask: expected [batch, tokens], got {list(mask.shape)}")
        with named_labels.named(self, named_labels.of_tokens(mask != 0)):
            yield

    def set_progress(self, progress: float) -> None:
        """Tells the schedule which share of the training is done, in [0, 1]."""
        self._selector.set_progress(progress)

    def begin_step(self, step: int, steps: int) -> None:
        """Tells that optimizer step `step`, from 0, of `steps` begins.

        The schedule goes on, and random scores depend on the seed, the process and the step from
        here on, so that a resumed training draws what one without interruption draws.

        Raises:
            ValueError: `step` is not between 0 and `steps`.
        """
        if not 0 <= step <= steps:
            raise ValueError(f"step: expected a number between 0 and steps = {steps}, got {step}")
        self.set_progress(step / max(steps, 1))
        self._scorer.begin_step(step)

    def statistics(self) -> list[LayerStatistics]:
        """What each layer kept in the last training forward pass; empty before the first."""
        return self._selector.statistics()

    # A forward pass

    def _acts_on(self, module: nn.Module, arguments: dict[str, Any]) -> bool:
        """Whether a call of `module` is a training forward pass."""
        # A cache means generation. config.use_cache is a default for it and does not count here.
        cached = arguments.get("use_cache") or any(arguments.get(n) is not None for n in CACHES)
        if not torch.is_grad_enabled():
            return False  # nothing to save, and a reference model may be what is asked
        if module.training and not cached:
            return True
        if not self._has_trained:
            why = "a key-value cache is used" if module.training else "the model is in eval mode"
            self._say(f"{why}, so the model's own forward runs and nothing is eliminated")
        return False

    def _loss(self, arguments: dict[str, Any]) -> EliminatedOutput:
        """The output for a call with labels: nothing of the size of all logits is made."""
        asked = wants_hidden_states(arguments, self._architecture.config)
        ignore_index = arguments.get("ignore_index", IGNORE_INDEX)
        batch, x = self._embed(arguments)
        targets, lost = next_labels(
            batch, arguments["labels"], arguments.get("shift_labels"), ignore_index
        )
        decoder = self._dense_decoder if asked else self._decoder
        x, entries = self._decode(decoder, batch, x, targets != ignore_index, asked)
        loss, counted = causal_lm_loss(
            self._architecture,
            x,
            targets,
            self._selector.masked_rows(complete=asked),
            self.config.loss_chunk,
            arguments.get("num_items_in_batch"),
            ignore_index,
            lost,
        )
        if counted:
            self._has_trained = True
        elif torch.is_grad_enabled() and bool((targets != ignore_index).any()):
            self._nothing_trained()
        output = EliminatedOutput(loss=loss)
        rows = named_labels.of_call(arguments)

        def logits() -> Tensor:
            with named_labels.named(self, rows):
                return self._logits(arguments).logits

        output["logits"] = DeferredLogits(logits, self._architecture.causal_lm.parameters())
        if entries is not None:
            entries.append(batch.unpack(self._architecture.final_norm(x)[1]))
            output["hidden_states"] = tuple(entries)
        return output

    def _logits(self, arguments: dict[str, Any]) -> EliminatedOutput:
        """The output for a call without labels, or with a loss function of somebody's own."""
        states = self._states(arguments)
        keep = arguments.get("logits_to_keep", 0)
        columns = slice(-keep, None) if isinstance(keep, int) else keep  # -0: all
        logits = self._architecture.lm_head(states.last_hidden_state[:, columns])
        return EliminatedOutput(logits=logits, hidden_states=states.hidden_states)

    def _custom_loss(self, arguments: dict[str, Any]) -> EliminatedOutput:
        with named_labels.named(self, named_labels.of_call(arguments)):
            output = self._logits(arguments)
        extra = ("num_items_in_batch", "shift_labels", "ignore_index")
        loss = self._architecture.causal_lm.loss_function(
            logits=output.logits,
            labels=arguments["labels"],
            vocab_size=self._architecture.config.vocab_size,
            **{name: arguments[name] for name in extra if name in arguments},
        )
        return EliminatedOutput(loss=loss, logits=output.logits, hidden_states=output.hidden_states)

    def _states(self, arguments: dict[str, Any]) -> BaseModelOutputWithPast:
        """The decoder's output: in each row what the dense model gives."""
        batch, x = self._embed(arguments)
        labelled = self._pack_labels(batch, "inputs_embeds" in arguments)
        asked = wants_hidden_states(arguments, self._architecture.config)
        x, entries = self._decode(self._dense_decoder, batch, x, labelled, asked)
        self._has_trained = True
        hidden = self._architecture.final_norm(x)[1]
        masked = self._selector.masked_rows(complete=True)
        if masked is not None:
            self._say(
                "logits or hidden states were asked for: every row of them is what the dense model "
                "gives, and gradients come from the rows that are kept"
                + ("" if labelled is not None else _LABELS_UNKNOWN)
            )
            # Rows without a graph in the layers have none behind them either.
            hidden = torch.where(masked[:, None], hidden.detach(), hidden)
        hidden = batch.unpack(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            hidden_states=None if entries is None else (*entries, hidden),
        )

    def _pack_labels(self, batch: PackedBatch, embedded: bool) -> Tensor | None:
        """[T] bool: rows that predict a label, as far as they are named."""
        if self.row_labels is None:
            return None
        rows = self.row_labels.to(batch.layout.block_starts.device)
        missing = batch.shape[1] - rows.shape[1]
        if embedded and missing > 0:
            rows = pad(rows, (missing, 0))  # PEFT's virtual tokens come before the others
        if tuple(rows.shape) != tuple(batch.shape):
            raise ValueError(
                f"mask: expected one for each token, [batch, tokens] = {list(batch.shape)}, got "
                f"{list(rows.shape)}"
            )
        return batch.pack(rows)

    def _embed(self, arguments: dict[str, Any]) -> tuple[PackedBatch, Tensor]:
        check_arguments(arguments, self._architecture.config)
        self._architecture.check_parts()
        return self._architecture.embed(
            arguments.get("input_ids"),
            arguments.get("inputs_embeds"),
            arguments.get("attention_mask"),
            arguments.get("position_ids"),
            self.block_size,
        )

    def _decode(
        self,
        decoder: Decoder,
        batch: PackedBatch,
        x: Tensor,
        labelled: Tensor | None,
        with_entries: bool,
    ) -> tuple[Tensor, list[Tensor] | None]:
        """(stream after the last layer, unpacked stream at each layer's entry if asked)."""
        entries: list[Tensor] | None = [] if with_entries else None
        visit = None if entries is None else lambda entry: entries.append(batch.unpack(entry))
        x = decoder.run(batch, x, labelled, visit_residual=visit)
        if torch.is_grad_enabled():
            self._selector.check_kept()
        return x, entries

    def _nothing_trained(self) -> None:
        message = (
            "labels: expected one or more of the batch's to be predicted from a row that counts, "
            "got none, so nothing is trained{}; more rows have to be kept (keep, thresholds), or "
            "fewer masked (burn_in)"
        )
        if not self._has_trained:
            raise ValueError(message.format(""))
        self._say(message.format(" in this step"))

    def _say(self, message: str) -> None:
        """A warning, once for each handle."""
        if message not in self._said:
            self._said.add(message)
            warnings.warn(f"lemo: {message}", stacklevel=2)


def _causal_lm_forward(
    handle: Handle, arguments: dict[str, Any], forward: ReplacedForward, original: Callable[[], Any]
) -> Any:
    causal_lm = forward.__self__
    if not handle._acts_on(causal_lm, arguments):
        return original()
    if forward.previous is not None:
        # Somebody's own forward calls the decoder, and may make another loss of it.
        with named_labels.named(handle, named_labels.of_call(arguments)):
            return original()
    if arguments.get("labels") is None:
        output = handle._logits(arguments)
    elif causal_lm.loss_function is ForCausalLMLoss:
        output = handle._loss(arguments)
    else:
        output = handle._custom_loss(arguments)
    return _returned(output, arguments, causal_lm)


def _decoder_forward(
    handle: Handle, arguments: dict[str, Any], forward: ReplacedForward, original: Callable[[], Any]
) -> Any:
    if not handle._acts_on(forward.__self__, arguments):
        return original()
    return _returned(handle._states(arguments), arguments, forward.__self__)


def _returned(output: ModelOutput, arguments: dict[str, Any], module: nn.Module) -> Any:
    return_dict = arguments.get("return_dict")
    if return_dict is None:
        return_dict = module.config.return_dict
    return output if return_dict else output.to_tuple()
