"""The demo's base model: a small Llama, trained densely at a short context."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lemo.data import read_documents, token_windows


@dataclasses.dataclass(frozen=True)
class BaseConfig:
    """Shape and training of the base model; sizes in tokens and hidden units."""

    vocabulary: int = 512
    hidden: int = 128
    intermediate: int = 352
    layers: int = 4
    heads: int = 2
    key_value_heads: int = 1
    context: int = 512
    batch: int = 2
    steps: int = 300
    learning_rate: float = 3e-3
    seed: int = 0


def train_base(
    folder: Path,
    documents: Path,
    tokenizer: PreTrainedTokenizerFast,
    config: BaseConfig,
    progress: Callable[[int, float], None],
) -> None:
    """Train a Llama from scratch and write it with its tokenizer as a model folder.

    Args:
        folder: the model folder to write.
        documents: file of the training documents.
        tokenizer: has ``config.vocabulary`` entries.
        config: shape and training.
        progress: called with (steps done, loss) after each step.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(
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
    windows = token_windows(read_documents(documents), tokenizer, config.context, config.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    warmup = max(1, config.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / config.steps)) + 0.02
        ),
    )
    model.train()
    for step in range(config.steps):
        ids = windows.batch(step * config.batch, config.batch)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        progress(step + 1, loss.item())
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(f"{folder}: the base model cannot be written: {error}") from error
    tokenizer.save_pretrained(folder)
