"""lemo.TrainerCallback: token elimination in the training loop of Transformers."""

from typing import Any

import transformers

from lemo.models.enable import Handle

__all__ = ["TrainerCallback"]


class TrainerCallback(transformers.TrainerCallback):
    """Tells lemo where the training of a `transformers.Trainer` is.

    Drives `LemoConfig.schedule`, and makes random blocks depend on the step, so that a training
    that is resumed from a checkpoint keeps what one without interruption keeps.

        handle = lemo.enable(model, config)
        Trainer(model, args, train_dataset=data, callbacks=[lemo.TrainerCallback(handle)]).train()

    Args:
        handle: what `lemo.enable` returned for the trainer's model.

    Raises:
        TypeError: it is none.
    """

    def __init__(self, handle: Handle) -> None:
        if not isinstance(handle, Handle):
            raise TypeError(
                f"handle: expected what lemo.enable returns, got {type(handle).__name__}"
            )
        self._handle = handle

    def on_step_begin(
        self,
        args: transformers.TrainingArguments,
        state: transformers.TrainerState,
        control: transformers.TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._handle.begin_step(state.global_step, state.max_steps)
