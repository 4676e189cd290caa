"""The demo's base model: a small Llama, trained densely at a short context."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lemo.data import ExampleWindows
from lemo.models.calls.labels import IGNORE_INDEX


@dataclasses.dataclass(frozen=True)
class BaseConfig:
    """Shape and training of the base model; sizes in tokens and hidden units.

    Attributes:
        context: tokens of its context.
        first_context: tokens of the prompts that it begins with: looking up is learned sooner where
            there is less to look through.
        first_share: share of the steps on these.
        batch_tokens: tokens of a step, about.
    """

    vocabulary: int = 1024
    hidden: int = 128
    intermediate: int = 352
    layers: int = 3
    heads: int = 8
    key_value_heads: int = 4
    context: int = 128
    first_context: int = 64
    first_share: float = 0.6
    batch_tokens: int = 768
    steps: int = 240
    learning_rate: float = 1e-2
    seed: int = 0

    def context_of(self, step: int) -> int:
        """Tokens of the prompts of step `step`, from 0."""
        return self.first_context if step < self.first_share * self.steps else self.context


def train_base(
    folder: Path,
    prompts: dict[int, ExampleWindows],
    tokenizer: PreTrainedTokenizerFast,
    config: BaseConfig,
    progress: Callable[[int, float], None],
) -> None:
    """Train a Llama from scratch and write it with its tokenizer as a model folder.

    The loss is the mean over all tokens plus the mean over the answers.

    Args:
        folder: the model folder to write.
        prompts: for the first context and for the whole one prompts with labels on their answers.
        tokenizer: has ``config.vocabulary`` entries.
        config: shape and training.
        progress: called with (steps done, loss of the answers) after each step.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    torch.manual_seed(config.seed)
    model = _untrained(tokenizer, config)
    optimizers = _optimizers(model, config.learning_rate)
    schedules = [_schedule(optimizer, config.steps) for optimizer in optimizers]
    model.train()
    drawn = dict.fromkeys(prompts, 0)
    for step in range(config.steps):
        length = config.context_of(step)
        count = max(1, config.batch_tokens // length)
        windows = [prompts[length].window(drawn[length] + index) for index in range(count)]
        drawn[length] += count
        of_all, of_answers = _losses(
            model,
            [window.ids for window in windows],
            [window.labels for window in windows],
            config.vocabulary,
        )
        (of_all + of_answers).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
        progress(step + 1, of_answers.item())
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(f"{folder}: the base model cannot be written: {error}") from error
    tokenizer.save_pretrained(folder)


def _untrained(tokenizer: PreTrainedTokenizerFast, config: BaseConfig) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.hidden,
            intermediate_size=config.intermediate,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.key_value_heads,
            max_position_embeddings=config.context,
            tie_word_embeddings=True,
            # Narrow layers need more than Transformers' 0.02: about the root of 1 / hidden.
            initializer_range=0.9 * config.hidden**-0.5,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up, then a cosine, which ends a little above 0."""
    warmup = max(1, steps // 20)

    def share(step: int) -> float:
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.02)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def _optimizers(model: LlamaForCausalLM, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, in a tenth of AdamW's steps here; AdamW for embedding and norms."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    return [
        torch.optim.Muon(
            matrices, lr=learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _losses(
    model: LlamaForCausalLM, ids: Sequence[Tensor], labels: Sequence[Tensor], vocabulary: int
) -> tuple[Tensor, Tensor]:
    """Mean cross entropies of all tokens and of the answers, over prompts padded at their ends."""
    padded = pad_sequence(list(ids), batch_first=True, padding_value=0)
    wanted = [
        pad_sequence(list(of), batch_first=True, padding_value=IGNORE_INDEX) for of in (ids, labels)
    ]
    # What stands behind a token does not change it: padding needs no mask.
    logits = model(input_ids=padded).logits[:, :-1].reshape(-1, vocabulary)
    of_all, of_answers = (
        cross_entropy(logits, of[:, 1:].reshape(-1), ignore_index=IGNORE_INDEX) for of in wanted
    )
    return of_all, of_answers
