"""Why a training step keeps the blocks of one prompt: what the report's picture shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

import lemo
from lemo import ops
from lemo.data.chat import ChatEncoder, Encoded
from lemo.data.conversations import Conversation, parse_example
from lemo.data.rows import Row, read_rows
from lemo.demo.facts import fact_line, question
from lemo.models.calls.labels import IGNORE_INDEX, of_tokens
from lemo.packing.blocks import block_tokens
from lemo.relevance.answers import Answers

# Tokens in front of an answer whose words count as the question's, as lemo.ops.word_relevance says.
_TOKENS_BEFORE = 16
_BEST_BLOCKS = 3
_WORDS_SHOWN = 4


def explain(
    model: Path,
    documents: Path,
    tokenizer: PreTrainedTokenizerBase,
    elimination: lemo.LemoConfig,
    length: int,
) -> dict[str, Any]:
    """What `lemo.report.run.RelevanceMap` reads, for the first prompt that fits into `length`.

    Args:
        model: folder of the base model.
        documents: prompts of `lemo.demo.facts`.
        tokenizer: the model's.
        elimination: what training keeps; its scorer is "lexical".
        length: tokens of a prompt at most.

    Raises:
        ValueError: no prompt fits.
    """
    encoder = ChatEncoder(tokenizer)
    for row in read_rows(documents):
        example = parse_example(row)
        if not isinstance(example, Conversation):
            continue
        encoded = encoder.encode(example)
        if len(encoded.ids) <= length:
            return _explained(model, row, encoded, tokenizer, elimination)
    raise ValueError(f"documents: expected a prompt of at most {length} tokens, got none")


def _explained(
    model: Path,
    row: Row,
    example: Encoded,
    tokenizer: PreTrainedTokenizerBase,
    elimination: lemo.LemoConfig,
) -> dict[str, Any]:
    ids, labels = torch.tensor(example.ids), torch.tensor(example.labels)
    block_size = _block_size(elimination, len(ids))
    answers = Answers.of(of_tokens(labels != IGNORE_INDEX))
    assert answers is not None
    scores = ops.word_relevance(ids, answers.firsts, answers.ends, block_size)
    turns = row.record["messages"]
    questions = []
    for number, (first, end) in enumerate(zip(answers.firsts, answers.ends, strict=True)):
        asked = turns[2 * number]["content"].rpartition("\n")[2]
        words = ids[max(0, first + 1 - _TOKENS_BEFORE) : end + 1]
        best = scores[number].argsort(descending=True)[:_BEST_BLOCKS].tolist()
        questions.append(
            {
                "question": asked,
                "answer": turns[2 * number + 1]["content"].strip(),
                "blocks": [
                    {
                        "block": block,
                        "score": scores[number, block].item(),
                        "words": _shared(ids, words, block, block_size, tokenizer),
                    }
                    for block in best
                    if scores[number, block] > 0
                ],
            }
        )
    return {
        "block_size": block_size,
        "tokens": len(ids),
        "scores": scores.amax(0).tolist(),
        "kept": _kept(model, ids, labels, elimination),
        "facts": _facts(row.record, tokenizer, {entry["question"] for entry in questions}),
        "questions": questions,
    }


def _block_size(elimination: lemo.LemoConfig, tokens: int) -> int:
    block_size = elimination.resolved(answers=True).block_size
    assert block_size is not None
    return block_tokens(block_size, tokens)


def _kept(model: Path, ids: Tensor, labels: Tensor, elimination: lemo.LemoConfig) -> list[int]:
    """The blocks that a training forward pass keeps, in every layer."""
    causal_lm = AutoModelForCausalLM.from_pretrained(model)
    handle = lemo.enable(causal_lm, elimination)
    causal_lm.train()
    causal_lm(input_ids=ids[None], labels=labels[None])
    kept = handle.statistics()[0].attention_blocks
    count = -(-len(ids) // _block_size(elimination, len(ids)))
    return list(range(count)) if kept is None else kept.tolist()


def _shared(
    ids: Tensor, words: Tensor, block: int, block_size: int, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """The rarest of `words` that stand in a block, as texts; none that stands in every block."""
    blocks = [set(part.tolist()) for part in ids.split(block_size)]
    having = {word: sum(word in part for part in blocks) for word in set(words.tolist())}
    found = [word for word in having if word in blocks[block] and having[word] < len(blocks)]
    found.sort(key=lambda word: (having[word], word))
    texts = (tokenizer.decode([word]).strip() for word in found)
    return [text for text in texts if text][:_WORDS_SHOWN]


def _facts(
    record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, questions: set[str]
) -> list[dict[str, Any]]:
    """Where the planted facts stand, in tokens, and whether they are asked for."""
    prompt = record["messages"][0]["content"]
    offsets = tokenizer(prompt, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    starts = [start for start, _ in offsets]
    facts = []
    for kind, value in record["facts"].items():
        line = fact_line(kind, value)
        place = prompt.find(line)
        token = sum(start < place for start in starts)
        asked = question(kind) in questions
        facts.append({"token": token, "text": line.strip(), "asked": asked})
    return sorted(facts, key=lambda fact: fact["token"])
