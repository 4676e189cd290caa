"""lemo.enable: token elimination in the training forward pass of a Hugging Face causal LM."""

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from lemo.distributed.context import ContextParallel
from lemo.models.callback import attach
from lemo.models.calls import labels as named_labels
from lemo.models.calls.arguments import ForwardArguments
from lemo.models.calls.interception import check_around, check_not_compiled
from lemo.models.calls.replaced_forward import ReplacedForward
from lemo.models.generic.parts import Parts
from lemo.models.generic.path import GenericPath
from lemo.models.layers.architectures import architecture_of, is_known
from lemo.models.layers.cuda_graphs import CudaGraphs
from lemo.models.memory.sharded import is_sharded
from lemo.models.native import NativePath
from lemo.models.path import Path
from lemo.models.training import Training
from lemo.models.verify import verify_sharded
from lemo.selection.statistics import LayerStatistics
from lemo.settings.elimination import LemoConfig

__all__ = ["Handle", "enable"]

_ATTRIBUTE = "_lemo_handle"


def enable(
    model: "nn.Module | transformers.Trainer",
    config: LemoConfig | None = None,
    context_parallel: ContextParallel | ProcessGroup | DeviceMesh | None = None,
) -> "Handle":
    """Makes the training forward pass of `model` eliminate tokens, until `handle.remove()`.

    Replaces `forward` on two instances, the causal LM and its decoder; classes stay as they are. It
    acts while the model is in training mode, gradients are enabled and no key-value cache is used;
    otherwise the model's own forward runs. PEFT may wrap the model before or after, a trainer may
    be made before or after; `Accelerator.prepare` comes after.

    Where the model gets `labels`, it computes the loss a chunk of rows at a time, from the labels
    of rows that are kept; `logits` are computed when they are read. Where logits or hidden states
    are asked for, each of their rows is what the dense model gives: rows that are left out are
    computed, too, without a graph, and gradients come from the kept rows. Blocks that have labels
    are kept first;
    which these are is known from `labels`, from `Handle.labelled`, or from a trainer's batches.

    Args:
        model: a causal LM of Transformers, possibly wrapped by PEFT; or the
            `transformers.Trainer` of one (TRL's are such), see `Handle.attach`. How its layers run
            is a setting, `LemoConfig.path`.
        config: the settings; None: the defaults.
        context_parallel: processes that share out the kept rows of each batch, which they all call
            the model with: a process group, a mesh with a dimension "cp", or a
            `lemo.ContextParallel` (docs/MULTI_GPU.md); None: this process has them all.

    Returns:
        The handle that drives the schedule, tells what was kept, and undoes it all.

    Raises:
        TypeError: `model` holds no supported causal LM, or `config` is no LemoConfig.
        ValueError: lemo is enabled already, Accelerate has prepared the model, layers or attention
            are not Transformers' own, leaving rows out is not defined for the model's layers, the
            model uses attention dropout or another unsupported setting, or `config` does not fit
            the model (for example a list without one entry for each layer).
        NotImplementedError: the settings or the model do not go with `context_parallel`.
    """
    config = LemoConfig() if config is None else config
    if not isinstance(config, LemoConfig):
        raise TypeError(f"config: expected a LemoConfig, got {type(config).__name__}")
    if isinstance(model, transformers.Trainer):
        handle = enable(model.model, config, context_parallel)
        handle.attach(model)
        return handle
    context = None if context_parallel is None else ContextParallel.of(context_parallel)
    return Handle(_path(model, config, context), config, model)


def _path(
    model: nn.Module, config: LemoConfig, context: ContextParallel | None
) -> Path[Training[Any]]:
    """The path that the settings ask for, or that fits the model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch module, got {type(model).__name__}")
    if config.path == "native" or (config.path == "auto" and is_known(model)):
        architecture = architecture_of(model)
        check_around(model, architecture.causal_lm)
        check_not_compiled(architecture.decoder)
        _check_free(architecture.causal_lm)
        _check_free(architecture.decoder)
        if "forward" in vars(architecture.decoder):
            raise _replaced(architecture.decoder)
        return NativePath(architecture, config, context)
    if config.products != "dtype":
        raise ValueError(
            f"products: expected 'dtype' in the generic path, where layers run by their own code, "
            f"got '{config.products}'"
        )
    parts = Parts.of(model)
    check_around(model, parts.causal_lm)
    for module in {parts.causal_lm, parts.base, parts.decoder}:
        check_not_compiled(module)
        _check_free(module)
    return GenericPath(parts, config, context)


def _check_free(module: nn.Module) -> None:
    if hasattr(module, _ATTRIBUTE):
        raise ValueError(
            "model: lemo is already enabled on it; call handle.remove() first, or for a trainer of "
            "it handle.attach(trainer)"
        )
    if hasattr(module, "_original_forward"):  # by Accelerate
        raise _replaced(module)


def _replaced(module: nn.Module) -> ValueError:
    remedy = "call lemo.enable before Accelerator.prepare and the like"
    if hasattr(module, "_hf_hook"):
        remedy = (
            "a device_map over several devices does so: load the model on one device, or use "
            "LemoConfig(path='generic')"
        )
    return ValueError(
        f"model: expected {type(module).__name__} with the forward of its class, got one replaced "
        f"on the instance; {remedy}"
    )


class Handle:
    """Token elimination on one model; made by `lemo.enable`.

    Attributes:
        config: the settings.
        path: how the model's training pass is computed.
        weights, scales: see `counting`; None and False outside of it.
    """

    def __init__(self, path: Path[Training[Any]], config: LemoConfig, model: nn.Module) -> None:
        self.config = config
        self.path = path
        self._model = model
        self._forward = path.forward
        path.install()
        self._installed = [
            ReplacedForward(module, self, run) for module, run in path.modules.items()
        ]
        for forward in self._installed:
            setattr(forward.__self__, _ATTRIBUTE, self)
        # Trainers call what they were given, and may replace the forward further inside.
        self._watcher = named_labels.Watcher(self._forward)
        self.weights: list[Tensor] | None = None
        self.scales = False
        self._undo: list[Callable[[], None]] = []
        self._detach: list[Callable[[], None]] = []
        self.watch(model)

    @property
    def block_size(self) -> int | float:
        """Tokens of a block, or their share of a batch's longest sequence.

        That of `config`, or that of the predictors where it leaves the choice to them. Where it
        leaves it to the batch: that of the latest one, before the first that of text.
        """
        return self._forward.elimination.block_size

    @property
    def causal_lm(self) -> nn.Module:
        """The model whose forward is replaced, without what wraps it."""
        return self.path.causal_lm

    @property
    def context_parallel(self) -> ContextParallel | None:
        """The processes that share out the rows of a batch; None: this one has them all."""
        return self._forward.context

    def remove(self) -> None:
        """Gives the model its own forward back; does nothing when called again.

        Where somebody wrapped the forward since (a trainer, Accelerate's mixed precision), the
        wrapper stays, around the model's own forward.
        """
        for forward in self._installed:
            forward.release()
            delattr(forward.__self__, _ATTRIBUTE)
        if self._installed:
            self.path.uninstall()
            if self._forward.context is not None:
                self._forward.context.stop_averaging()
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

        The loss of TRL's SFTTrainer is treated as one inside the model: left-out tokens are not
        computed, and their labels do not count, neither in the loss nor in its metrics. Label
        smoothing, a `compute_loss_func` and a `compute_loss` of a subclass are losses outside.

        Where lemo was enabled with `context_parallel`, the trainer's arguments have a
        parallelism_config with the group's size as `cp_size`; lemo then shares out the kept rows in
        place of accelerate's context parallelism, which cuts the tokens (docs/MULTI_GPU.md).

        Args:
            trainer: one of this handle's model, Transformers' or made on it, such as TRL's.

        Raises:
            TypeError: it is no trainer.
            ValueError: it trains another model, or has other groups of processes.
        """
        self._detach.append(attach(trainer, self))

    def interrupted(self) -> None:
        """Tells that a call ends by what is no error, such as KeyboardInterrupt."""
        self._watcher.interrupted()

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
        the first batch: it finds differences between the model and what lemo assumes of it.
        Gradients and random numbers stay as they are.

        Args:
            batch: what the model is called with: input_ids [B, S], and attention_mask,
                position_ids and labels [B, S] where there are any.
            tokens: how many tokens of its first sequence to use.

        Raises:
            TypeError: `batch` is no mapping.
            ValueError: they differ; the message says by how much, and in which layer first. Or the
                batch cannot be used, or torch.inference_mode is on.
        """
        if not isinstance(batch, Mapping):
            raise TypeError(
                "batch: expected a mapping with what the model is called with, got "
                f"{type(batch).__name__}"
            )
        if torch.is_inference_mode_enabled():
            raise ValueError(
                "verify: expected a call outside of torch.inference_mode, which has no gradients"
            )
        if not any(map(is_sharded, self.causal_lm.modules())):
            self.path.verify(batch, tokens)
        elif is_sharded(self._model):
            verify_sharded(self._model, self._forward, batch, tokens)
        else:
            raise ValueError(
                "model: expected lemo.enable to be called on what fully_shard is called on last, "
                "which verify has to call, got a model inside of it"
            )

    def loss(self, **arguments: Any) -> Tensor:
        """The loss that a training forward gives, fp32 scalar, in whatever mode the model is.

        With gradients off, too, where the model's own forward runs otherwise.

        Args:
            arguments: as the model takes them, with `labels`.

        Raises:
            ValueError: there are no labels; the model makes another loss than Transformers'
                ForCausalLMLoss; or as of the model.
        """
        call = ForwardArguments.of(arguments)
        if call.labels is None and call.shift_labels is None:
            raise ValueError("labels: expected those of the tokens, got none")
        self.path.check_loss()
        self._forward.check_call(call)
        return self._forward.loss(call).loss

    @contextmanager
    def labelled(self, mask: Tensor) -> Iterator[None]:
        """Names the tokens whose prediction the loss counts, for forward passes without `labels`.

            with handle.labelled(completion_mask):
                logits = model(input_ids).logits

        Args:
            mask: [B, S] of bool or 0/1, set where `labels` would not be -100. Blocks from which
                these tokens are predicted are kept before the others.

        Raises:
            TypeError: no tensor.
            ValueError: not two-dimensional; from the forward pass: not one for each token.
        """
        _check_of_tokens("mask", mask)
        with self.naming(named_labels.of_tokens(mask != 0)):
            yield

    @contextmanager
    def scored(self, scores: Tensor) -> Iterator[None]:
        """Gives the scores of tokens for scorer "given", for forward passes inside.

            with handle.scored(scores):
                loss = model(input_ids, labels=labels).loss

        Args:
            scores: [B, S], higher is more informative; a block has the largest score of its
                tokens, so scores of blocks are repeated for their tokens. Those of padding are not
                read. With `keep_relevance` at least 0. Best on the CPU, where they are checked
                without waiting for a GPU.

        Raises:
            TypeError: no tensor.
            ValueError: not two-dimensional, not finite, or below 0 with `keep_relevance`; from the
                forward pass: not one for each token.
        """
        _check_of_tokens("scores", scores)
        found = scores.detach().float()
        if not found.isfinite().all():
            wrong = found[~found.isfinite()][0].item()
            raise ValueError(f"scores: expected finite numbers in fp32, got {wrong}")
        if self.config.keep_relevance is not None and bool((found < 0).any()):
            raise ValueError(
                "scores: expected numbers of at least 0 with keep_relevance, a share of whose sum "
                f"is kept, got {found.min().item():g}"
            )
        before, self._forward.token_scores = self._forward.token_scores, found
        try:
            yield
        finally:
            self._forward.token_scores = before

    @contextmanager
    def on_host(self, input_ids: Tensor) -> Iterator[None]:
        """Gives the tokens of forward passes inside on the CPU, where words are compared.

            with handle.on_host(ids):
                on_gpu = ids.pin_memory().to("cuda", non_blocking=True)
                loss = model(on_gpu, labels=labels).loss

        So a pass need not wait for a GPU to read them back, if `labels` are on the CPU, too, and
        nothing is padded. The native path alone reads them.

        Args:
            input_ids: [B, S] int64 on the CPU, what the model is called with.

        Raises:
            TypeError: no tensor.
            ValueError: not two-dimensional, or on another device; from the forward pass: of
                another shape than the model's.
        """
        _check_of_tokens("input_ids", input_ids)
        if input_ids.device.type != "cpu":
            raise ValueError(f"input_ids: expected them on the CPU, got {input_ids.device}")
        before = self._forward.host_ids
        self._forward.host_ids = input_ids
        try:
            yield
        finally:
            self._forward.host_ids = before

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Says that passes inside find the model as the first of them finds it.

        Where CUDA graphs replay passes, its modules are then read once, not in every pass. Values
        of weights may change, in place. Modules and adapters may not be replaced or switched,
        weights not moved or frozen, and hooks neither come nor go.
        """
        with self._forward.unchanged():
            yield

    def naming(self, rows: Tensor | None) -> AbstractContextManager[None]:
        """Names rows that predict a label, [B, S] bool, for forward passes inside.

        None leaves what is known already.
        """
        return named_labels.named(self._forward, rows)

    def overtake(self) -> Callable[[], None]:
        """Puts lemo's forward around one that a trainer has put around the causal LM's since.

        Returns:
            What undoes it.
        """
        causal_lm = self.causal_lm
        prepared = hasattr(causal_lm, "_original_forward")  # by Accelerate, which takes it off
        if prepared or isinstance(vars(causal_lm)["forward"], ReplacedForward):
            return lambda: None
        return ReplacedForward(causal_lm, self, self.path.modules[causal_lm]).release

    @contextmanager
    def counting(self, scales: bool) -> Iterator[list[Tensor]]:
        """Says that only a sum over labels is made of what TRL's head returns inside.

        Args:
            scales: whether the loss, which is that sum and what routers add, is multiplied by the
                weight.

        Yields:
            The weight, fp32 scalar, by which to multiply the sum of each training pass so far.
        """
        before = self.weights, self.scales
        self.weights, self.scales = [], scales
        try:
            yield self.weights
        finally:
            self.weights, self.scales = before

    @property
    def row_labels(self) -> Tensor | None:
        """[B, S] bool, rows that predict a label, in the forward pass that runs; None: unknown."""
        return self._forward.row_labels

    def set_progress(self, progress: float) -> None:
        """Tells `keep_schedule` which share of the training is done, in [0, 1]."""
        self._forward.set_progress(progress)

    def begin_step(self, step: int, steps: int) -> None:
        """Tells that optimizer step `step`, from 0, of `steps` begins.

        `keep_schedule` goes on, and random scores depend on the seed, the process and the step from
        here on, so that a resumed training draws what one without interruption draws. With products
        "fp8" some weights are rounded anew; without this call their rounding stays the same.

        Raises:
            TypeError: `step` is no whole number.
            ValueError: it is not between 0 and `steps`.
        """
        step = _whole("step", step)
        if not 0 <= step <= steps:
            raise ValueError(f"step: expected a number between 0 and steps = {steps}, got {step}")
        self.set_progress(step / max(steps, 1))
        self.path.begin_step(step)

    def begin_pass(self, index: int) -> None:
        """Tells that forward pass `index` of the step begins, after `begin_step`.

        The passes of all processes are counted, in the order in which one process would do them.
        Random scores depend on the seed, the step and this number from here on, so that several
        processes keep what one process keeps on the same data.

        Raises:
            TypeError: `index` is no whole number.
            ValueError: it is below 0.
        """
        index = _whole("index", index)
        if index < 0:
            raise ValueError(f"index: expected a number of 0 or more, got {index}")
        self._forward.begin_pass(index)

    def statistics(self) -> list[LayerStatistics]:
        """What each layer kept in the last training forward pass; empty before the first."""
        return self._forward.selector.statistics()

    def reason_of_nan(self) -> str | None:
        """Which layer's scores of blocks were nan, where a loss is nan for that; None: none were.

        On a GPU scores are not waited for, so the loss tells of them. On the CPU the pass raises
        FloatingPointError.
        """
        return self._forward.reason_of_nan()

    @property
    def graphs(self) -> CudaGraphs | None:
        """CUDA graphs of training passes (`LemoConfig.cuda_graphs`); None: off, or none here."""
        return self._forward.graphs

    def general_modules(self) -> dict[str, str]:
        """Modules that training runs as they are, not in lemo's own code, and why.

        Norms, projections with their adapters, MLPs and the head of the native path count; in the
        generic path it is the decoder as a whole. What such a module stores for backward is its own
        affair. Call it under autocast if training runs under autocast.

        Returns:
            Reasons by the modules' names in `causal_lm`; empty: everything runs in lemo's code.
        """
        return self.path.general_modules()

    def unquantised_products(self) -> dict[str, str]:
        """Linear layers whose products stay in the model's dtype with products "fp8", and why.

        Errors are measured in the first training pass, which also logs those that are too large.
        Queries and keys (q_proj and k_proj) and the last layer's MLP always stay.

        Returns:
            Reasons by the modules' names in `causal_lm`; empty: none were asked to be in 8 bits.
        """
        return self.path.unquantised_products()

    def acts_on(self, module: nn.Module, arguments: ForwardArguments) -> bool:
        """Whether a call of `module` is a training forward pass."""
        if not torch.is_grad_enabled():
            return False  # nothing to save, and a reference model may be what is asked
        # A cache means generation. config.use_cache is a default for it and does not count here.
        training = module.training and not self._watcher.evaluates
        if training and not arguments.generates:
            return True
        if not self._forward.has_trained:
            why = "a key-value cache is used" if training else "the model is in eval mode"
            self._forward.say(f"{why}, so the model's own forward runs and nothing is eliminated")
        return False


def _check_of_tokens(name: str, values: Tensor) -> None:
    """Refuses what is not [batch, tokens]."""
    if not torch.is_tensor(values):
        raise TypeError(f"{name}: expected a [batch, tokens] tensor, got {type(values).__name__}")
    if values.ndim != 2:
        raise ValueError(f"{name}: expected [batch, tokens], got {list(values.shape)}")


def _whole(name: str, number: int) -> int:
    """A whole number of any kind, such as NumPy's, as an int."""
    try:
        return operator.index(number)
    except TypeError:
        raise TypeError(f"{name}: expected a whole number, got {number!r}") from None
