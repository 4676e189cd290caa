"""Runs of answers.py: fine-tuning by a method, dense evaluation, and what a forward pass kept."""

from __future__ import annotations

import copy
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

import lemo
from answer_chunks import Chunks, targets_of
from answer_tasks import Haystacks, Mixture, Window
from common.timing import summary
from lemo.models.projections.fp8 import fp8_of
from lemo.packing.blocks import BlockLayout
from lemo.packing.to_device import to_device
from lemo.training.evaluate import window_losses

__all__ = [
    "Method",
    "Protocol",
    "Recall",
    "Trial",
    "exact_answers",
    "fine_tune",
    "now",
    "perplexity",
    "share_of_needed",
    "shares",
]

# Steps that allocate and compile: no part of the time that --minutes gives.
_FIRST_STEPS = 3
_MOST_STEPS = 100_000
# Tokens of a block, and the blocks of each window that a pass kept.
Kept = tuple[int, list[list[int]]]
# Final learning rate, as a share of the highest one.
_FINAL_RATE = 0.1


@dataclass(frozen=True)
class Method:
    """How a window is trained on.

    Attributes:
        name: in answers.yaml.
        elimination: fields of LemoConfig; None: the plain model, without lemo.
        scores: "needed": the blocks that answers need come first, as the benchmark knows them;
            None: what the scorer of `elimination` says.
        chunks: of a shorter window of blocks in their old positions (as `Chunks` takes them); None:
            the whole window.
        in_dtype: linear layers, by the end of their names, whose products are never in 8 bits.
        steps: 0: no training; None: as the protocol says.
        learning_rate: at which it learns most in 100 steps; None: it was not looked for.
    """

    name: str
    elimination: Mapping[str, Any] | None = None
    scores: str | None = None
    chunks: Mapping[str, Any] | None = None
    in_dtype: Sequence[str] = ()
    steps: int | None = None
    learning_rate: float | None = None

    @property
    def keep(self) -> float:
        if self.chunks is not None:
            return self.chunks["keep"]
        return 1.0 if self.elimination is None else self.elimination.get("keep", 0.5)

    @property
    def scorer(self) -> str | None:
        if self.scores is not None:
            return self.scores
        if self.chunks is not None:
            return "lexical" if self.chunks.get("words") else "random"
        if self.keep == 1.0:
            return None
        return self.elimination["scorer"]


@dataclass(frozen=True)
class Protocol:
    """What all methods have in common.

    Attributes:
        steps: optimizer steps.
        minutes: of steps, instead of their number; None: `steps` counts.
        batch: windows of a step.
        micro_batch: windows of a forward pass.
        learning_rate: the highest one, after `warmup` steps; it falls to a tenth.
        warmup: steps.
        lengths: tokens of the windows in equal parts of the steps, one after the other.
        workers: processes that make windows.
        evaluate_every: steps between evaluations; 0: only at the end.
    """

    steps: int
    minutes: float | None
    batch: int
    micro_batch: int
    learning_rate: float
    warmup: int
    lengths: tuple[int, ...]
    workers: int
    evaluate_every: int = 0


class Trial:
    """A model with LoRA, and with lemo on it as the method says.

    Args:
        base: the model, on the CPU; it stays as it is.
        method: the method.
        rank: of LoRA.
        seed: of LoRA, of random scores and of random blocks.
        device: where it runs.
    """

    def __init__(
        self, base: PreTrainedModel, method: Method, rank: int, seed: int, device: str
    ) -> None:
        torch.manual_seed(seed)
        lora = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        self.method = method
        self.model = get_peft_model(copy.deepcopy(base), lora).to(device).train()
        self.device = device
        self.handle = None
        if method.elimination is not None:
            config = lemo.LemoConfig(**{"seed": seed, **method.elimination})
            self.handle = lemo.enable(self.model, config)
        for name, module in self.model.named_modules():
            layer = getattr(module, "base_layer", None)
            found = None if layer is None else fp8_of(layer)
            if found is not None and name.endswith(tuple(method.in_dtype)):
                found.remove()
        self._generator = torch.Generator().manual_seed(seed)
        self._chunks = None if method.chunks is None else Chunks(method.chunks, seed)

    def begin_step(self, step: int, steps: int, progress: float) -> None:
        if self.handle is not None:
            self.handle.begin_step(step, steps)
            self.handle.set_progress(progress)

    def prepared(self, windows: Sequence[Window]) -> dict[str, Tensor]:
        """The tensors of some windows for `loss`: on the device, by copies that the host does not
        wait for, but for what lemo reads on the host."""
        ids = torch.stack([window.ids for window in windows])
        labels = torch.stack([window.labels for window in windows])
        tensors = {"ids": ids, "labels": labels}
        if self._chunks is not None:
            tensors |= self._chunks.of(ids, labels)
        if self.method.scores is not None:
            tensors["scores"] = self._scores(windows)
        if self.handle is not None:
            tensors["ids_on_host"] = ids
        host = () if self.handle is None else ("ids_on_host", "labels")
        return {
            name: tensor if name in host else to_device(tensor, torch.device(self.device))
            for name, tensor in tensors.items()
        }

    def loss(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Mean loss of the labels of prepared windows, a scalar with a graph."""
        if self.handle is None:
            return self._plain_loss(tensors)
        scored = nullcontext()
        if "scores" in tensors:
            scored = self.handle.scored(tensors["scores"])
        with scored, self.handle.on_host(tensors["ids_on_host"]):
            return self.model(input_ids=tensors["ids"], labels=tensors["labels"]).loss

    def _plain_loss(self, tensors: Mapping[str, Tensor]) -> Tensor:
        targets = tensors.get("targets")
        if targets is None:
            targets = targets_of(tensors["labels"])
        first = int((targets != -100).any(0).nonzero()[0])
        # Without a mask Transformers takes gaps between positions for borders of sequences.
        mask = torch.ones_like(tensors["ids"])
        if "bias" in tensors:
            mask = Chunks.mask(tensors["bias"], tensors["blocks"], self.model.dtype)
        logits = self.model(
            input_ids=tensors["ids"],
            position_ids=tensors.get("positions"),
            attention_mask=mask,
            use_cache=False,
            logits_to_keep=targets.shape[1] - first,
        ).logits
        return cross_entropy(logits.flatten(0, 1).float(), targets[:, first:].flatten())

    def _scores(self, windows: Sequence[Window]) -> Tensor:
        """[B, S] fp32: 1 where an answer needs a token, elsewhere random numbers below a half."""
        shape = (len(windows), len(windows[0].ids))
        scores = 0.5 * torch.rand(shape, generator=self._generator)
        for row, window in zip(scores, windows):
            for start, end in itertools.chain(*(answer.needed for answer in window.answers)):
                row[start:end] = 1.0
        return scores

    def kept(self, windows: Sequence[Window]) -> Callable[[], Kept | None]:
        """What tells the blocks that the last pass, of these windows, kept in its first layer;
        None: everything. Only that call waits for the device."""
        if self._chunks is not None:
            found = self._chunks.block_size(len(windows[0].ids)), self._chunks.kept
            return lambda: found
        layers = [] if self.handle is None else self.handle.statistics()
        if not layers or layers[0].attention_blocks is None:
            return lambda: None
        return partial(_of_windows, layers[0].layout, layers[0].attention_blocks)

    def close(self) -> None:
        """Gives the memory back."""
        if self.handle is not None:
            self.handle.remove()
        self.model = self.handle = None
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()


def _of_windows(layout: BlockLayout, blocks: Tensor) -> Kept:
    """The kept blocks of each window, from their numbers in the batch."""
    ends = np.cumsum(layout.block_counts)
    numbers = blocks.cpu().numpy()
    parts = np.split(numbers, np.searchsorted(numbers, ends)[:-1])
    firsts = ends - np.array(layout.block_counts)
    return layout.block_size, [(part - first).tolist() for part, first in zip(parts, firsts)]


# --- recall


def share_of_needed(window: Window, size: int, kept: Sequence[int]) -> float | None:
    """Share of the blocks with needed spans that are kept; None where nothing is needed."""
    needed = {
        block
        for answer in window.answers
        for start, end in answer.needed
        for block in range(start // size, (end - 1) // size + 1)
    }
    return len(needed.intersection(kept)) / len(needed) if needed else None


class Recall:
    """Percent of needed blocks that were kept, by task."""

    def __init__(self) -> None:
        self._shares: dict[str, list[float]] = {}

    def add(self, windows: Sequence[Window], kept: Kept | None) -> None:
        for number, window in enumerate(windows):
            share = 1.0
            if kept is not None:
                share = share_of_needed(window, kept[0], kept[1][number])
            if share is not None:
                self._shares.setdefault(window.task, []).append(share)

    def percent(self) -> dict[str, float]:
        return {task: 100 * statistics.mean(found) for task, found in self._shares.items()}


# --- training


class _Steps(Dataset):
    """Item number i: the windows of step i."""

    def __init__(self, mixture: Mixture, protocol: Protocol) -> None:
        self._mixture, self._protocol = mixture, protocol

    def __getitem__(self, step: int) -> list[Window]:
        lengths, batch = self._protocol.lengths, self._protocol.batch
        tokens = lengths[min(step * len(lengths) // self._protocol.steps, len(lengths) - 1)]
        return [self._mixture.window(step * batch + i, tokens) for i in range(batch)]


def _unchanged(item: list[Window]) -> list[Window]:
    return item


def _in_one_thread(worker: int) -> None:
    # Threads of tokenizers do not survive the fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _batches(mixture: Mixture, protocol: Protocol, steps: int) -> Iterator[list[Window]]:
    """The windows of each step, made ahead by other processes."""
    loader = DataLoader(
        _Steps(mixture, protocol),
        batch_size=None,
        sampler=range(steps),
        num_workers=protocol.workers,
        collate_fn=_unchanged,
        worker_init_fn=_in_one_thread,
        prefetch_factor=4 if protocol.workers else None,
    )
    return iter(loader)


def fine_tune(
    trial: Trial, mixture: Mixture, protocol: Protocol, evaluate: Callable[[], Any]
) -> dict[str, Any]:
    """Trains a trial's adapter.

    Args:
        trial: the model.
        mixture: where windows come from.
        protocol: how long, how fast.
        evaluate: called every `protocol.evaluate_every` steps; its results are the curve.

    Returns:
        {"steps", "step_s", "step_s_range", "training_s", "peak_gib", "kept_share", "loss", "curve",
        "recall" (percent by task)}. The time of a step is the median, on the GPU and off it, from
        its windows, scores included, to the end of the optimizer's step.
    """
    gpu = trial.device.startswith("cuda")
    parameters = [each for each in trial.model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=protocol.learning_rate, weight_decay=0.0, fused=gpu
    )
    steps = _MOST_STEPS if protocol.minutes else protocol.steps
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    recall, times, losses, kept_shares, curve = Recall(), [], [], [], []
    spent = 0.0
    for step, windows in enumerate(_batches(mixture, protocol, steps)):
        done = spent / (60 * protocol.minutes) if protocol.minutes else step / steps
        if done >= 1.0:
            break
        rate = min(1.0, (step + 1) / protocol.warmup) * (1.0 - (1.0 - _FINAL_RATE) * done)
        for group in optimizer.param_groups:
            group["lr"] = protocol.learning_rate * rate
        parts = [
            windows[first : first + protocol.micro_batch]
            for first in range(0, len(windows), protocol.micro_batch)
        ]
        seconds, loss = _step(trial, optimizer, parts, (step, steps, done), (recall, kept_shares))
        times.append(seconds)
        losses.append(loss)
        if not math.isfinite(loss):
            raise FloatingPointError(f"step {step}: expected a finite loss, got {loss}")
        if step >= _FIRST_STEPS:
            spent += seconds
        if step % 10 == 9:
            print(
                f"{trial.method.name}: step {step + 1}, loss {statistics.mean(losses[-10:]):.4f}, "
                f"{statistics.median(times):.3f} s a step",
                flush=True,
            )
        if protocol.evaluate_every and (step + 1) % protocol.evaluate_every == 0:
            curve.append([step + 1, evaluate()])
    timed = times[min(_FIRST_STEPS, len(times) // 2) :]
    return {
        "steps": len(times),
        "step_s": round(statistics.median(timed), 4),
        "step_s_range": summary(timed).range,
        "training_s": round(sum(times), 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3) if gpu else None,
        "kept_share": round(statistics.mean(kept_shares), 4),
        "loss": round(statistics.mean(losses[-10:]), 5),
        "curve": curve,
        "recall": recall.percent(),
    }


def _step(
    trial: Trial,
    optimizer: torch.optim.Optimizer,
    parts: Sequence[Sequence[Window]],
    progress: tuple[int, int, float],
    records: tuple[Recall, list[float]],
) -> tuple[float, float]:
    """One optimizer step on the windows of its micro-batches: its seconds and its loss.

    The host waits for the device before and behind the step; in it only where the method itself
    does: losses and what was kept are read afterwards.
    """
    recall, kept_shares = records
    trial.begin_step(*progress)
    labels = [sum(int((window.labels != -100).sum()) for window in part) for part in parts]
    losses, kept = [], []
    start = now(trial.device)
    for part, count in zip(parts, labels):
        loss = trial.loss(trial.prepared(part)) * (count / sum(labels))
        loss.backward()
        losses.append(loss.detach())
        kept.append(trial.kept(part))
    optimizer.step()
    optimizer.zero_grad()
    seconds = now(trial.device) - start
    for part, read in zip(parts, kept):
        found = read()
        recall.add(part, found)
        kept_shares.append(_kept_share(part, found))
    return seconds, sum(map(float, losses))


def _kept_share(windows: Sequence[Window], kept: Kept | None) -> float:
    if kept is None:
        return 1.0
    blocks = math.ceil(len(windows[0].ids) / kept[0])
    return statistics.mean(len(found) for found in kept[1]) / blocks


def now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


# --- evaluation, dense


@torch.no_grad()
def exact_answers(model: PreTrainedModel, windows: Sequence[Window]) -> list[dict[str, Any]]:
    """What the model answers when all tokens before are given, window by window.

    Args:
        model: a causal LM; it is in eval mode inside, where lemo leaves nothing out.
        windows: any number.

    Returns:
        For each answer {"task", "depth", "exact" (every token of it is the one that the model puts
        first)}.
    """
    training = model.training
    model.eval()
    found = []
    for window in windows:
        first = window.answers[0].start
        rows = len(window.ids) - first + 1
        logits = model(
            input_ids=window.ids[None].to(model.device), use_cache=False, logits_to_keep=rows
        ).logits
        right = logits[0, :-1].argmax(-1).cpu() == window.ids[first:]
        for answer in window.answers:
            exact = bool(right[answer.start - first : answer.end - first].all())
            found.append({"task": window.task, "depth": answer.depth, "exact": exact})
    model.train(training)
    return found


def shares(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Percent of exact answers: {"exact", "answers" (their number), "depth" (by quarter of the
    window, of answers that need something), "not_stated" (of those that need nothing)}."""

    def percent(some: Sequence[bool]) -> float:
        return round(100.0 * statistics.mean(some), 2)

    quarters: dict[str, list[bool]] = {}
    for answer in sorted(found, key=lambda each: each["depth"] or 0.0):
        if answer["depth"] is not None:
            quarters.setdefault(str(int(4 * answer["depth"])), []).append(answer["exact"])
    not_stated = [answer["exact"] for answer in found if answer["depth"] is None]
    return {
        "exact": percent([answer["exact"] for answer in found]),
        "answers": len(found),
        "depth": {quarter: percent(some) for quarter, some in quarters.items()},
        **({"not_stated": percent(not_stated)} if not_stated else {}),
    }


def perplexity(
    model: PreTrainedModel, haystacks: Haystacks, lengths: Sequence[int], windows: int
) -> dict[str, float]:
    """Perplexity of ordinary text, by length: of the first tokens of some documents.

    Args:
        model: a causal LM; it is in eval mode inside.
        haystacks: the documents; those shorter than a length do not count for it.
        lengths: tokens.
        windows: documents, at most, taken evenly from all.
    """
    training = model.training
    model.eval()
    result = {}
    for length in lengths:
        long = [each.ids for each in haystacks.documents if len(each.ids) >= length]
        chosen = long[:: max(len(long) // windows, 1)][:windows]
        losses = [
            window_losses(model, torch.from_numpy(ids[:length].astype(np.int64))).mean()
            for ids in chosen
        ]
        if losses:
            result[str(length)] = round(torch.stack(losses).mean().exp().item(), 4)
    model.train(training)
    return result
