"""A tiny Llama with a byte-level tokenizer, and documents for it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from devices import on_gpu

WORDS = ["the", "block", "of", "tokens", "that", "a", "layer", "keeps", "says", "it", "read"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: one token a byte, and ``<s>`` as beginning and pad."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0} | {piece: i for i, piece in enumerate(alphabet, start=1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<s>")


def save_tiny_llama(folder: Path, layers: int = 2, context: int = 64, width: int = 32) -> Path:
    """Write a Llama with random weights and its tokenizer into ``folder``.

    On a GPU it is 256 wide, with heads of 64, which the kernels there know.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=256 if on_gpu() else width,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def sample_text(words: int, seed: int) -> str:
    """Random words, the same ones for the same seed."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def write_documents(path: Path, count: int = 4, words: int = 120) -> Path:
    """A .jsonl file of ``count`` documents of alternating kinds "a" and "b"."""
    records = [
        {"id": f"document {i}", "kind": "ab"[i % 2], "text": sample_text(words, i)}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
