"""lemo.enable: token elimination in the training forward pass of a Hugging Face causal LM."""

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from lemo.config import LemoConfig
from lemo.models.adapters import Adapter, adapter_for
from lemo.models.batch import PackedBatch
from lemo.models.decoder import Decoder
from lemo.models.loss import IGNORE_INDEX, causal_lm_loss, next_labels
from lemo.scorers import PredictorScorer, RandomScorer, make_scorer
from lemo.selection import LayerStatistics, Selector

__all__ = ["Handle", "enable"]

_ATTRIBUTE = "_lemo_handle"


def enable(model: nn.Module, config: LemoConfig | None = None) -> "Handle":
    """Makes the training forward pass of `model` eliminate tokens, until `handle.remove()`.

    Replaces `forward` on two instances, the causal LM and its decoder; classes stay as they are. It
    acts while the model is in training mode and no key-value cache is used; otherwise the model's
    own forward runs. With `labels` the loss is computed in segments and `logits` is None. PEFT may
    wrap the model before or after; `Accelerator.prepare` comes after.

    Args:
        model: a causal LM (Llama, Mistral, Qwen2, Qwen3, OPT), possibly wrapped by PEFT.
        config: the settings; None: the defaults.

    Returns:
        The handle that drives the schedule, tells what was kept, and undoes it all.

    Raises:
        TypeError: `model` holds no supported causal LM, or `config` is no LemoConfig.
        ValueError: lemo is enabled already, the forward was replaced by somebody else, the model
            uses attention dropout or another unsupported setting, or `config` does not fit the
            model (for example a list without one entry for each layer).
    """
    config = LemoConfig() if config is None else config
    if not isinstance(config, LemoConfig):
        raise TypeError(f"config: expected a LemoConfig, got {type(config).__name__}")
    adapter = adapter_for(model)
    for module in (adapter.causal_lm, adapter.decoder):
        if hasattr(module, _ATTRIBUTE):
            raise ValueError("model: lemo is already enabled on it; call handle.remove() first")
        if "forward" in vars(module):
            raise ValueError(
                f"model: expected {type(module).__name__} with the forward of its class, got one "
                "replaced on the instance; call lemo.enable before Accelerator.prepare and the like"
            )
    adapter.check_supported()
    return Handle(adapter, config)


class Handle:
    """Token elimination on one model; made by `lemo.enable`.

    Attributes:
        config: the settings.
        block_size: tokens of a block, or their share of a batch's longest sequence: that of
            `config`, or that of the predictors where it leaves the choice to them.
    """

    def __init__(self, adapter: Adapter, config: LemoConfig) -> None:
        self.config = config
        self._adapter = adapter
        self._scorer = make_scorer(config, adapter)
        thresholds, self.block_size = None, config.block_size
        if isinstance(self._scorer, PredictorScorer):
            thresholds = self._scorer.predictors.thresholds
            self.block_size = self._scorer.predictors.block_size
        self._selector = Selector(config, adapter.num_layers, thresholds)
        self._decoder = Decoder(
            adapter,
            self._selector,
            self._scorer,
            visible_keys=config.visible_keys,
            group_size=config.group_size or 0,
            recompute=config.recompute,
        )
        self._installed = [
            _replace_forward(adapter.causal_lm, self, Handle._causal_lm_forward),
            _replace_forward(adapter.decoder, self, Handle._decoder_forward),
        ]

    def remove(self) -> None:
        """Gives the model its own forward back; does nothing when called again.

        Raises:
            RuntimeError: somebody wrapped the forward since (Accelerate's mixed precision does);
                nothing is changed then.
        """
        for module, method in self._installed:
            if vars(module).get("forward") != method:
                raise RuntimeError(
                    f"{type(module).__name__}.forward was wrapped after lemo.enable; undo that "
                    "first, for example with "
                    "accelerator.unwrap_model(model, keep_fp32_wrapper=False)"
                )
        for module, _ in self._installed:
            del module.forward
            delattr(module, _ATTRIBUTE)
        self._installed = []

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
        if isinstance(self._scorer, RandomScorer):
            self._scorer.begin_step(step)

    def statistics(self) -> list[LayerStatistics]:
        """What each layer kept in the last training forward pass; empty before the first."""
        return self._selector.statistics()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on exactly as this one would."""
        state: dict[str, Any] = {"progress": self._selector.progress}
        if isinstance(self._scorer, RandomScorer):
            state["random"] = self._scorer.generator.get_state()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave."""
        self.set_progress(state["progress"])
        if isinstance(self._scorer, RandomScorer):
            self._scorer.generator.set_state(state["random"])

    def _causal_lm_forward(self, arguments: dict[str, Any]) -> CausalLMOutputWithPast:
        labels = arguments.get("labels")
        if labels is None:
            outputs = self._adapter.decoder(**arguments, return_dict=True)
            keep = arguments.get("logits_to_keep", 0)
            columns = slice(-keep, None) if isinstance(keep, int) else keep  # -0: all
            logits = self._adapter.lm_head(outputs.last_hidden_state[:, columns])
            return CausalLMOutputWithPast(logits=logits, hidden_states=outputs.hidden_states)
        if self._adapter.causal_lm.loss_function is not ForCausalLMLoss:
            raise ValueError(
                "model.loss_function: expected Transformers' ForCausalLMLoss, which lemo computes "
                f"in segments, got {self._adapter.causal_lm.loss_function}"
            )
        batch, x = self._embed(arguments)
        ignore_index = arguments.get("ignore_index", IGNORE_INDEX)
        targets = next_labels(batch, labels, arguments.get("shift_labels"), ignore_index)
        x, entries = self._decode(arguments, batch, x, targets != ignore_index)
        loss = causal_lm_loss(
            self._adapter,
            x,
            targets,
            self._selector.masked_rows(),
            self.config.loss_segment,
            arguments.get("num_items_in_batch"),
            ignore_index,
        )
        if entries is not None:
            entries.append(batch.unpack(self._adapter.stream_output(x)[1]))
        return CausalLMOutputWithPast(
            loss=loss, hidden_states=None if entries is None else tuple(entries)
        )

    def _decoder_forward(self, arguments: dict[str, Any]) -> BaseModelOutputWithPast:
        batch, x = self._embed(arguments)
        x, entries = self._decode(arguments, batch, x)
        hidden = batch.unpack(self._adapter.stream_output(x)[1])
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            hidden_states=None if entries is None else (*entries, hidden),
        )

    def _embed(self, arguments: dict[str, Any]) -> tuple[PackedBatch, Tensor]:
        self._check_arguments(arguments)
        return self._adapter.embed(
            arguments.get("input_ids"),
            arguments.get("inputs_embeds"),
            arguments.get("attention_mask"),
            arguments.get("position_ids"),
            self.block_size,
        )

    def _decode(
        self,
        arguments: dict[str, Any],
        batch: PackedBatch,
        x: Tensor,
        labelled: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor] | None]:
        """(stream after the last layer, unpacked stream at each layer's entry if asked)."""
        if not self._flag(arguments, "output_hidden_states"):
            return self._decoder.run(batch, x, labelled), None
        entries: list[Tensor] = []
        x = self._decoder.run(
            batch, x, labelled, visit_stream=lambda entry: entries.append(batch.unpack(entry))
        )
        return x, entries

    def _flag(self, arguments: dict[str, Any], name: str) -> bool:
        return bool(arguments.get(name, getattr(self._adapter.config, name, False)))

    def _check_arguments(self, arguments: dict[str, Any]) -> None:
        if self._flag(arguments, "output_attentions"):
            raise ValueError(
                "output_attentions: not available while lemo eliminates tokens; its attention "
                "never holds the weights. Use model.eval(), or handle.remove()"
            )
        if arguments.get("cu_seq_lens_q") is not None and arguments.get("position_ids") is None:
            raise ValueError(
                "position_ids: expected for packed sequences, got None; cu_seq_lens_q is not read"
            )
        mask = arguments.get("attention_mask")
        if mask is not None and not torch.is_tensor(mask):
            raise TypeError(
                f"attention_mask: expected a [batch, tokens] tensor, got {type(mask).__name__}"
            )


def _replace_forward(
    module: nn.Module, handle: Handle, implementation: Callable[[Handle, dict[str, Any]], Any]
) -> tuple[nn.Module, MethodType]:
    """Puts a forward on the instance that runs `implementation` while elimination is active.

    The handle is looked up on the module, not closed over, so that a deep copy of the model runs
    with its own copy. The signature stays the class's, which trainers inspect.
    """
    original = type(module).forward
    signature = inspect.signature(original)
    keywords = [p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        arguments = dict(signature.bind(self, *args, **kwargs).arguments)
        arguments.pop("self")
        for name in keywords:
            arguments.update(arguments.pop(name, {}))
        # A cache means generation. config.use_cache is a default for it and does not count here.
        caches = arguments.get("past_key_values") is not None or arguments.get("use_cache")
        if not self.training or caches:
            return original(self, *args, **kwargs)
        return_dict = arguments.pop("return_dict", None)
        output = implementation(getattr(self, _ATTRIBUTE), arguments)
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()

    # Accelerate unwraps by following __wrapped__ down to the innermost function: stop it here.
    del forward.__wrapped__
    forward.__signature__ = signature
    method = MethodType(forward, module)
    module.forward = method
    setattr(module, _ATTRIBUTE, handle)
    return module, method
