"""Token elimination in the trainers of Transformers and of those who build on it, such as TRL."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
import transformers
from torch import Tensor, nn

from lemo.distributed.context import ContextParallel
from lemo.models.calls import labels as named_labels
from lemo.models.calls.labelled_rows import sums_over_labels
from lemo.models.trainer_groups import cp_size_of, share_out

__all__ = ["TrainerCallback", "attach"]

# What collators call the tokens that a loss counts, where they give no `labels`.
_MASKS = ("completion_mask", "assistant_masks")


@runtime_checkable
class Steered(Protocol):
    """What a trainer steers: a `lemo.Handle`."""

    @property
    def causal_lm(self) -> nn.Module: ...

    @property
    def context_parallel(self) -> ContextParallel | None: ...

    def begin_step(self, step: int, steps: int) -> None: ...

    def begin_pass(self, index: int) -> None: ...

    def watch(self, module: nn.Module) -> Callable[[], None]: ...

    def naming(self, rows: Tensor | None) -> AbstractContextManager[None]: ...

    def overtake(self) -> Callable[[], None]: ...

    def counting(self, scales: bool) -> AbstractContextManager[list[Tensor]]: ...


class TrainerCallback(transformers.TrainerCallback):
    """Tells lemo where the training of a `transformers.Trainer` is.

    Drives `keep_schedule`, makes random blocks depend on the step, so that a training that is
    resumed from a checkpoint keeps what one without interruption keeps, and several processes keep
    what one keeps that accumulates the gradients of as many batches. Tells lemo which rows have
    labels, even if the trainer has replaced the model's forward.

        handle = lemo.enable(model, config)
        Trainer(model, args, train_dataset=data, callbacks=[lemo.TrainerCallback(handle)]).train()

    It does not know the trainer: `Handle.attach` does, for which TRL's SFTTrainer costs less.

    Args:
        handle: what `lemo.enable` returned for the trainer's model.

    Raises:
        TypeError: it is none.
    """

    def __init__(self, handle: Steered) -> None:
        if not isinstance(handle, Steered):
            raise TypeError(
                f"handle: expected what lemo.enable returns, got {type(handle).__name__}"
            )
        self._handle = handle
        self._unwatch: Callable[[], None] = lambda: None
        self._passes = 0
        self.is_attached = False

    def on_train_begin(
        self,
        args: transformers.TrainingArguments,
        *state: Any,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        self._check_attached(args)
        _check_forward(args)
        # The trainer may have wrapped the model since it was enabled.
        if model is not None:
            self._check_model(model)
            self._unwatch()
            self._unwatch = self._handle.watch(model)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._unwatch()

    def on_step_begin(
        self,
        args: transformers.TrainingArguments,
        state: transformers.TrainerState,
        control: transformers.TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._handle.begin_step(state.global_step, state.max_steps)
        self._passes = 0
        self._begin_pass(args)

    def on_substep_end(
        self,
        args: transformers.TrainingArguments,
        state: transformers.TrainerState,
        control: transformers.TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._passes += 1
        self._begin_pass(args)

    def _check_attached(self, args: transformers.TrainingArguments) -> None:
        size = cp_size_of(getattr(args, "parallelism_config", None))
        if size > 1 and not self.is_attached:
            raise ValueError(
                f"parallelism_config: expected a trainer that handle.attach(trainer) was called "
                f"with, where its cp_size is {size}, got the callback alone"
            )

    def _check_model(self, model: nn.Module) -> None:
        causal_lm = self._handle.causal_lm
        if not any(module is causal_lm for module in model.modules()):
            raise ValueError(
                f"model: expected the {type(causal_lm).__name__} that lemo was enabled on, got "
                "another one, which would train without lemo; a trainer with model_init makes a "
                "model when training begins: give it a model instead"
            )

    def _begin_pass(self, args: transformers.TrainingArguments) -> None:
        # Accelerate deals the batches out in turn, the same to all processes of a group.
        context = self._handle.context_parallel
        size = 1 if context is None else context.size
        processes, index = args.world_size // size, args.process_index // size
        self._handle.begin_pass(self._passes * processes + index)


def _check_forward(args: transformers.TrainingArguments) -> None:
    """Refuses Liger's loss, for which a trainer replaces the model's forward after `enable`."""
    kernels = getattr(args, "liger_kernel_config", None) or {}
    if getattr(args, "use_liger_kernel", False) and kernels.get("fused_linear_cross_entropy", True):
        raise ValueError(
            "use_liger_kernel: expected False, since Liger's loss takes the place of the forward "
            "in which lemo leaves tokens out, got True; lemo's own loss needs no logits either. "
            'liger_kernel_config={"fused_linear_cross_entropy": False} keeps Liger\'s other kernels'
        )


def attach(trainer: transformers.Trainer, handle: Steered) -> Callable[[], None]:
    """Adds the callback and names the labels of every batch; returns what undoes it.

    Raises:
        TypeError, ValueError: see `Handle.attach`.
    """
    if not isinstance(trainer, transformers.Trainer):
        raise TypeError(f"trainer: expected a transformers.Trainer, got {type(trainer).__name__}")
    if not any(module is handle.causal_lm for module in trainer.model.modules()):
        raise ValueError(
            f"trainer: expected one of the model that lemo was enabled on, got one of another "
            f"{type(trainer.model).__name__}"
        )
    context = handle.context_parallel
    keep_tokens = share_out(trainer, context)
    callback = TrainerCallback(handle)
    callback.is_attached = True
    trainer.add_callback(callback)
    compute_loss, step_aside = trainer.compute_loss, _nothing
    if sums_over_labels(trainer):
        step_aside = handle.overtake()
        compute_loss = _counting(compute_loss, handle)
    if context is not None and context.size > 1:
        compute_loss = _of_groups(compute_loss, context.size)

    @functools.wraps(compute_loss)
    def with_labels(model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with handle.naming(rows_of_batch(inputs)):
            return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = with_labels

    def undo() -> None:
        step_aside()
        keep_tokens()
        trainer.remove_callback(callback)
        if vars(trainer).get("compute_loss") is with_labels:
            del trainer.compute_loss

    return undo


def _nothing() -> None:
    pass


def _counting(compute_loss: Callable[..., Any], handle: Steered) -> Callable[..., Any]:
    """A `compute_loss` that sums over labels, for which rows that are left out do not count."""

    @functools.wraps(compute_loss)
    def of_kept_labels(
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        # Without a divisor of its own the loss is a mean over the labels that count.
        scales = num_items_in_batch is not None
        with handle.counting(scales) as weights:
            result = compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not weights:
            return result
        loss, *rest = result if return_outputs else (result,)
        (weight,) = weights
        context = handle.context_parallel
        if scales:
            loss = loss * weight
            # A sum over this process's rows, by the labels of all.
            loss = loss if context is None else context.total(loss)
        elif context is not None and context.size > 1:
            raise NotImplementedError(
                "num_items_in_batch: expected the number of labels of a step with "
                "context_parallel, where each process has its own rows only, got None"
            )
        else:
            # Nan where scores were, which the weight tells.
            loss = loss * (1.0 + 0.0 * weight)
        return (loss, *rest) if return_outputs else loss

    return of_kept_labels


def _of_groups(compute_loss: Callable[..., Any], size: int) -> Callable[..., Any]:
    """A `compute_loss` for processes of which `size` have the same loss.

    The trainer multiplies the loss by the number of processes, since their mean is taken, as if
    each had labels of its own.
    """

    @functools.wraps(compute_loss)
    def of_group(
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        result = compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if num_items_in_batch is None:
            return result
        return (result[0] / size, *result[1:]) if return_outputs else result / size

    return of_group


def rows_of_batch(inputs: dict[str, Any]) -> Tensor | None:
    """[B, S] bool: rows of a trainer's batch that predict what its loss counts; None: unknown."""
    ids = inputs.get("input_ids")
    if not torch.is_tensor(ids):
        return None
    labels = inputs.get("labels")
    masks = [] if labels is None else [labels != named_labels.IGNORE_INDEX]
    masks += [inputs[name] != 0 for name in _MASKS if torch.is_tensor(inputs.get(name))]
    fitting = [mask for mask in masks if mask.shape == ids.shape]
    return named_labels.of_tokens(fitting[0]) if fitting else None
