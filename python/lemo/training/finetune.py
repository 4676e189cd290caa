"""Fine-tuning with LoRA on long windows, with or without token elimination."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, gather_object, get_int_from_env, set_seed
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import lemo
from lemo.attention import register_attention
from lemo.data import (
    ExampleWindows,
    TokenWindows,
    TrainingBatch,
    collate,
    open_training_data,
    prefetched,
    tokenizing_threads,
)
from lemo.files import json_text, new_folder, write_file
from lemo.memory_errors import is_out_of_memory
from lemo.models.native import NativePath
from lemo.relevance.store import ScoreStore
from lemo.selection.statistics import blocks_of, kept_map
from lemo.settings.elimination import LemoConfig
from lemo.settings.finetune import FinetuneConfig
from lemo.training import fingerprint, memory, quantised, remarks
from lemo.training.adapter import embedding_of, origin_of
from lemo.training.behind import Copy, HostMemory, Writer, short_turns
from lemo.training.checkpoint import Checkpoint, load_checkpoint, random_state, save_checkpoint
from lemo.training.deterministic import deterministic
from lemo.training.kept_shares import KeptShares
from lemo.training.model import (
    MODEL_CONFIG,
    adapter_weights,
    add_lora,
    extend_context,
    leave_casts_to_autocast,
    load_config,
    load_model,
    load_tokenizer,
    pick_dtype,
    write_adapter,
)
from lemo.training.optimizer_state import packed
from lemo.training.planning import memory_limit, out_of_memory, plan_run
from lemo.training.processes import (
    check_passes,
    enter_folder,
    naming_lost_processes,
    of_main,
    process_group,
    process_state,
)
from lemo.training.replicas import Replicas
from lemo.training.run_folder import (
    ADAPTER_NAME,
    CHECKPOINTS_NAME,
    KEPT_MAP_NAME,
    check_folder,
    is_done,
    start_folder,
    write_config,
)
from lemo.training.run_log import LOG_NAME, RunLog, read_log
from lemo.training.sharding import check_sharding, cut_state, reduces, shard, whole
from lemo.training.step_records import AHEAD, StepRecords

_DISTRIBUTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)

_log = logging.getLogger("lemo")


@dataclass(frozen=True)
class RunResult:
    """The result of a run.

    Attributes:
        folder: the run folder; the adapter is in ``folder / "adapter"``.
        steps: optimizer steps of the run.
        seconds_per_step: wall-clock seconds of each step, those before a resumption included.
        peak_memory_bytes: highest memory of a step; see :mod:`lemo.training.memory`.
        final_loss: loss of the last step.
    """

    folder: Path
    steps: int
    seconds_per_step: list[float]
    peak_memory_bytes: int
    final_loss: float


def finetune(
    config: FinetuneConfig, progress: Callable[[dict[str, Any]], None] | None = None
) -> RunResult:
    """Fine-tune a model and leave a run folder with a plain PEFT adapter.

    With several processes (``torchrun``) every process takes windows of its own.

    Args:
        config: everything about the run.
        progress: gets the record of each step (see docs/design/runs.md), with "steps" and
            "seconds_left" added; called in the main process only.

    Raises:
        FileNotFoundError: model or documents do not exist; nothing to resume.
        FileExistsError: there is a run in `output` and neither resume nor overwrite is set, or
            something that lemo did not write and that overwriting would remove.
        BlockingIOError: another process works in `output`.
        ValueError: model, documents and settings do not fit each other, or what is resumed differs;
            a step does not fit into memory (`lemo.planner.plan.DoesNotFitError`).
        FloatingPointError: the loss is not finite any more.
        MemoryError: a step ran out of memory; the last checkpoint stays whole.
        OSError: the disk is full or not writable; the last checkpoint stays whole.
        ConnectionError: another process of the run is gone, or kept this one waiting too long.
    """
    folder = Path(config.output)
    with process_group(), naming_lost_processes(folder):
        return _finetune(config, folder, progress)


def _finetune(
    config: FinetuneConfig, folder: Path, progress: Callable[[dict[str, Any]], None] | None
) -> RunResult:
    accelerator = _accelerator(config)
    with ExitStack() as stack:
        enter_folder(folder, accelerator, stack)
        checkpoint = check_folder(folder, config)
        # No process changes the folder before every process has looked at it.
        accelerator.wait_for_everyone()
        if checkpoint is not None:
            check_passes(checkpoint, config, accelerator.num_processes)
        done = checkpoint is not None and is_done(folder, checkpoint, config)
        if config.deterministic:
            stack.enter_context(deterministic())
        run = _Run(config, accelerator, trains=not done)
        if checkpoint is not None:
            run.check(checkpoint)
        if done:
            _log.info("%s: all %d steps are done already", folder, config.steps)
            return _result(folder, config.steps)
        first = 0 if checkpoint is None else run.restore(checkpoint)
        run.verify(first)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process and checkpoint is None:
            start_folder(folder, config)
        elif accelerator.is_main_process:
            # Model or documents may have been called by another path.
            write_config(folder, config)
        accelerator.wait_for_everyone()
        if run.handle is not None:
            stack.enter_context(run.handle.unchanged())
        stack.enter_context(short_turns())
        run.train(folder, first, progress)
    return _result(folder, config.steps)


def learning_rate(step: int, config: FinetuneConfig) -> float:
    """Learning rate of optimizer step ``step`` (from 1): linear warm-up, then the schedule."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.learning_rate
    # One step more than there are, so that the last one still learns.
    share = (step - config.warmup_steps) / (config.steps - config.warmup_steps + 1)
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * share))


class _Run:
    """Model, data and optimizer of a run in this process.

    Errors in model, documents and settings are raised here, before anything is written to disk.
    With ``trains`` false no step is to come: nothing is planned, or said of the steps.
    """

    _weights: dict[str, Tensor] | None = None

    def __init__(self, config: FinetuneConfig, accelerator: Accelerator, trains: bool = True):
        self.config = config
        self.accelerator = accelerator
        self.replicas = Replicas.of(config, accelerator)
        model_config = load_config(config.model)
        if config.shard:
            check_sharding(config, model_config, accelerator)
        extend_context(model_config, config.context_length, config.rope_scaling)
        if trains:
            remarks.check_warmup(config)
        of_scorer = fingerprint.of_scorer(config.elimination, model_config)
        tokenizer = load_tokenizer(config.model)
        scores = _stored_scores(config, tokenizer)
        vocab_size = model_config.get_text_config().vocab_size
        self.windows = _windows(config, tokenizer, vocab_size, scores)
        dtype = pick_dtype(config.dtype, accelerator.device, config.elimination is not None)
        answers = isinstance(self.windows, ExampleWindows) and self.windows.has_answers
        wanted = config.elimination and config.elimination.resolved(answers)
        self.plan = None
        if trains:
            limit = _least_limit(config, accelerator)
            # One for all: where processes share out rows they have to store the same.
            asked = config, wanted, model_config, dtype, accelerator.device, limit
            self.plan = of_main(
                partial(plan_run, *asked, processes=accelerator.num_processes), accelerator
            )
        set_seed(config.seed)
        base = load_model(config.model, model_config, dtype, config.quantize, accelerator.device)
        self.inputs = fingerprint.of_inputs(
            config.model, base, tokenizer, of_scorer, scores.digest if scores else None
        )
        self.embedding = embedding_of(base)
        self.peft_model = self._with_lora(base)
        self.handle = None
        if config.elimination is not None:
            self.handle = self._enabled(config.elimination, answers, scores)
        self.trainable = [p for p in self.peft_model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            self.trainable,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            # One kernel for all parameters.
            fused=accelerator.device.type == "cuda",
        )
        self.optimizer = accelerator.prepare(optimizer)
        self.model = self.peft_model if config.shard else accelerator.prepare(self.peft_model)
        self.kept, self.host_memory = KeptShares(), HostMemory()

    def _with_lora(self, base: PreTrainedModel) -> PeftModel:
        """The model with its adapter, in training mode, where it is trained."""
        config, accelerator = self.config, self.accelerator
        # The same start of LoRA in all processes, then dropout of their own.
        set_seed(config.seed)
        model = add_lora(base, config)
        set_seed(config.seed + accelerator.process_index)
        model.train()
        if accelerator.mixed_precision != "no":
            leave_casts_to_autocast(model)
        if config.gradient_checkpointing:
            base.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        packed = isinstance(self.windows, ExampleWindows) and self.windows.packed
        if config.elimination is None and packed:
            # Others hold a mask of the size of tokens x tokens where a row has several examples.
            register_attention()
            base.set_attn_implementation("lemo")
        if config.shard:
            shard(model, accelerator)
        else:
            model.to(accelerator.device)
        return model

    def _enabled(self, asked: LemoConfig, answers: bool, scores: ScoreStore | None) -> lemo.Handle:
        """lemo on the model, which is where it is trained: scorers go where its weights are."""
        elimination = asked.resolved(answers)
        settings = elimination
        if self.plan is not None:
            settings = elimination.model_copy(update=self.plan.settings)
        handle = lemo.enable(self.peft_model, settings, self.replicas.context)
        # Behind enable: a mistake in the settings is all that is said of them.
        if elimination != asked:
            remarks.say_what_is_kept(elimination, answers)
        remarks.check_examples(elimination, self.windows)
        length = self.config.context_length
        remarks.check_blocks(length, handle.block_size, elimination)
        if scores is not None:
            remarks.check_stored_blocks(length, handle.block_size, scores)
        with self._autocast():
            remarks.say_what_runs_otherwise(handle)
        return handle

    @property
    def windows_per_step(self) -> int:
        config = self.config
        return config.batch_size * config.gradient_accumulation * self.replicas.count

    @property
    def _on_host(self) -> tuple[str, ...]:
        """What lemo reads on the host, for which it would wait if it were on a GPU."""
        # Wrappers for several processes move all of it.
        alone = self.accelerator.num_processes == 1
        native = self.handle is not None and isinstance(self.handle.path, NativePath)
        return ("labels", "position_ids") if alone and native else ()

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise ValueError unless ``checkpoint`` is of the same model, documents and the like."""
        fingerprint.check_inputs(checkpoint.inputs, self.inputs, checkpoint.folder)
        if checkpoint.data != self.windows.fingerprint:
            raise ValueError(
                f"documents: expected the ones that {checkpoint.folder} was trained on, but "
                f"'{self.config.documents}' holds others now, or another chat template applies"
            )

    def restore(self, checkpoint: Checkpoint) -> int:
        """Go back to the state of ``checkpoint``; returns its step."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        same = processes == checkpoint.num_processes
        state = load_checkpoint(checkpoint, self.peft_model, rank if same else None)
        self.optimizer.load_state_dict(cut_state(state["optimizer"], self.optimizer))
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        _log.info("resuming %s after step %d", self.config.output, checkpoint.step)
        return checkpoint.step

    def train(
        self, folder: Path, first: int, progress: Callable[[dict[str, Any]], None] | None
    ) -> None:
        """Run the steps after ``first``, with logs and checkpoints, and write the adapter."""
        config, main = self.config, self.accelerator.is_main_process
        if self.handle is not None and main:
            remarks.write_elimination(folder, self.handle.config)
        if self.plan is not None and main:
            remarks.say(self.plan.lines())
            self.plan.write(folder)
        log = RunLog(folder, first) if main else None
        reason = (lambda: None) if self.handle is None else self.handle.reason_of_nan
        device = self.accelerator.device
        records = StepRecords(config.steps, log, progress, reason, device)
        self.peak = memory.Peak(device, self.handle)
        # Tokenizing the next windows hides behind the step that runs.
        # Launchers say how many processes share a machine; without one there is one process.
        here = get_int_from_env(["LOCAL_WORLD_SIZE"], self.accelerator.num_processes)
        batches = prefetched(self.windows, self._batches(first), tokenizing_threads(here))
        writer = Writer()
        # Only a GPU has work of its own while the host reads and writes.
        behind = device.type == "cuda"
        try:
            for step in range(first + 1, config.steps + 1):
                writer.check()
                saves = step % config.save_every == 0 or step == config.steps
                # The step of the newest checkpoint that there is, or that is being written.
                saved = max(first, (step - 1) // config.save_every * config.save_every)
                with self._explained(step, saved):
                    record, loss = self._step(step, batches)
                    write = self._save(folder, step) if saves else None
                # Earlier steps are looked at while the latest ones run.
                records.finish(leave=AHEAD - 1)
                records.begin(record, loss)
                if write is not None:
                    # As soon as this step is done: a kill during the next one would lose it.
                    writer.submit(records.when_done(write))
                if not behind:
                    records.finish()
                    writer.wait()
                    records.restart()
            records.finish()
            weights = self._adapter_weights()
            writer.wait()
            if main:
                self._write_adapter(folder / ADAPTER_NAME, weights)
        except BaseException as error:
            records.leave()
            if isinstance(error, FloatingPointError):
                # A checkpoint that was still to be written may have shown it a step earlier.
                writer.wait()
            raise
        finally:
            batches.close()
            writer.close()
            if log is not None:
                log.close()
        self.accelerator.wait_for_everyone()

    def verify(self, done: int) -> None:
        """Checks, on the window after `done` steps, that lemo computes what the model computes."""
        if self.handle is None or not self.config.verify or done == self.config.steps:
            return
        batch = collate([self.windows.window(next(self._batches(done))[0])])
        with self.accelerator.autocast():
            self.handle.verify(batch.arguments())

    def _batches(self, done: int) -> Iterator[range]:
        """The windows of every forward pass in this process, after ``done`` steps."""
        config = self.config
        per_replica = config.batch_size * config.gradient_accumulation
        for step in range(done, config.steps):
            first = step * self.windows_per_step + self.replicas.index * per_replica
            for i in range(first, first + per_replica, config.batch_size):
                yield range(i, i + config.batch_size)

    @contextmanager
    def _explained(self, step: int, saved: int) -> Iterator[None]:
        """Around a step, whose error, where memory runs out, says what to do."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise out_of_memory(step, error, self.config, self.plan, saved) from error

    def _step(self, step: int, batches: Iterator[TrainingBatch]) -> tuple[dict[str, Any], Tensor]:
        """One optimizer step on the next batches; its log record, and its loss on the device."""
        config, accelerator = self.config, self.accelerator
        if self.handle is not None:
            self.handle.begin_step(step - 1, config.steps)
        rate = learning_rate(step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

        # Every label of the step counts the same, whatever forward pass it is in. DDP averages
        # the gradients of the processes, hence the factor; those that share out windows have those
        # of one loss.
        passes = [next(batches) for _ in range(config.gradient_accumulation)]
        labels, tokens = self._totals(passes)
        loss = torch.zeros((), device=accelerator.device)
        self.kept.clear()
        for i, batch in enumerate(passes):
            arguments = batch.arguments(accelerator.device, self._on_host)
            last = i == config.gradient_accumulation - 1
            if self.handle is not None:
                self.handle.begin_pass(self.replicas.index * config.gradient_accumulation + i)
            with self._reducing(last):
                with self._known(batch), self._autocast():
                    outputs = self.model(**arguments, num_items_in_batch=labels, use_cache=False)
                accelerator.backward(outputs.loss * self.replicas.count)
            loss += outputs.loss.detach()
            if self.handle is not None:
                self.kept.add(self.handle.statistics())
        if config.max_grad_norm > 0:
            accelerator.clip_grad_norm_(self.trainable, config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        memory.release_freed(accelerator.device, step)
        loss = accelerator.reduce(loss, reduction="sum") / self.replicas.size
        return {
            "step": step,
            "loss": math.nan,
            "learning_rate": rate,
            "tokens": tokens,
            "seconds": 0.0,
            "tokens_per_second": 0.0,
            "peak_memory_bytes": self.peak.bytes(),
            "kept_share": self.kept.share(),
            "kept": self.kept.by_layer(),
            "progress": (step - 1) / config.steps,
        }, loss

    def _reducing(self, wanted: bool) -> AbstractContextManager[None]:
        """Whether the processes' gradients are reduced by a backward pass inside."""
        if self.config.shard:
            reduces(self.model, wanted)
        elif not wanted:
            context: AbstractContextManager[None] = self.accelerator.no_sync(self.model)
            return context
        return nullcontext()

    def _autocast(self) -> AbstractContextManager[None]:
        # Accelerate puts it around the forward of a model that it prepares.
        context: AbstractContextManager[None] = nullcontext()
        if self.config.shard:
            context = self.accelerator.autocast()
        return context

    @contextmanager
    def _known(self, batch: TrainingBatch) -> Iterator[None]:
        """What lemo knows of the batch inside, besides what the model is called with."""
        with ExitStack() as known:
            if self.handle is not None and self._on_host:
                known.enter_context(self.handle.on_host(batch.input_ids))
            if self.handle is not None and batch.scores is not None:
                known.enter_context(self.handle.scored(batch.scores))
            yield

    def _totals(self, passes: list[TrainingBatch]) -> tuple[int, int]:
        """(labels, tokens) of a step, of all processes."""
        totals = [
            sum(batch.num_labels for batch in passes),
            sum(batch.input_ids.numel() for batch in passes),
        ]
        if self.accelerator.num_processes > 1:
            counted = torch.tensor(totals, device=self.accelerator.device)
            totals = self.accelerator.reduce(counted, reduction="sum").tolist()
            totals = [total // self.replicas.size for total in totals]
        return totals[0], totals[1]

    def _save(self, folder: Path, step: int) -> Callable[[], None] | None:
        """What writes a checkpoint, from copies; all processes gather, the main one gets it."""
        states = gather_object([random_state()])
        optimizer = {"optimizer": packed(whole(self.optimizer.state_dict()))}
        if self.accelerator.scaler is not None:
            optimizer["scaler"] = self.accelerator.scaler.state_dict()
        weights = self._adapter_weights()
        if not self.accelerator.is_main_process:
            return None
        kept = self.kept.last
        blocks = {} if kept is None else blocks_of(kept)
        state = {"weights": weights, "optimizer": optimizer, "blocks": blocks}
        held = Copy(state, self.host_memory)

        def write() -> None:
            state = held.value()
            save_checkpoint(
                folder / CHECKPOINTS_NAME,
                step,
                self.peft_model,
                state["weights"],
                state["optimizer"],
                states,
                data=self.windows.fingerprint,
                inputs=self.inputs,
                config=self.config,
            )
            if kept is not None:
                write_file(folder / KEPT_MAP_NAME, json_text(kept_map(kept, state["blocks"])))

        return write

    def _adapter_weights(self) -> dict[str, Tensor]:
        """The adapter's weights as they are now, whole; all processes have to call it."""
        # To find them takes longer than a step of a small model. What is gathered is a copy.
        if self._weights is None or self.config.shard:
            self._weights = adapter_weights(self.peft_model)
        return self._weights

    def _write_adapter(self, folder: Path, weights: dict[str, Tensor]) -> None:
        with new_folder(folder) as target:
            write_adapter(self.peft_model, weights, target)
            # The base model as it was trained: its scaled rotary embedding is part of the result.
            content = self.peft_model.get_base_model().config.to_json_string(use_diff=False)
            known = json.loads(content) | origin_of(target, self.embedding)
            if self.config.quantize is not None:
                known = quantised.remember(known, self.config.quantize)
            content = json.dumps(known, indent=2, sort_keys=True) + "\n"
            write_file(target / MODEL_CONFIG, content)


def _accelerator(config: FinetuneConfig) -> Accelerator:
    device = process_state(config).device
    dtype = pick_dtype(config.dtype, device, config.elimination is not None)
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "no")
    # Accelerate keeps the precision of the first Accelerator for the whole process otherwise.
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=precision, cpu=device.type == "cpu")
    if accelerator.distributed_type not in _DISTRIBUTED:
        raise ValueError(
            "accelerate: expected a single process or data parallelism on CPUs or GPUs, got "
            f"{accelerator.distributed_type.value}"
        )
    return accelerator


def _least_limit(config: FinetuneConfig, accelerator: Accelerator) -> int | None:
    """Bytes that a step may take in each process."""
    limits = gather_object([memory_limit(config, accelerator.device)])
    return min((limit for limit in limits if limit is not None), default=None)


def _stored_scores(config: FinetuneConfig, tokenizer: PreTrainedTokenizerBase) -> ScoreStore | None:
    if config.elimination is None or config.elimination.scores is None:
        return None
    wanted = {
        "context_length": config.context_length,
        "labels": config.labels,
        "tokenizer": fingerprint.of_tokenizer(tokenizer),
    }
    return ScoreStore.read(config.elimination.scores, wanted)


def _windows(
    config: FinetuneConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    scores: ScoreStore | None,
) -> TokenWindows | ExampleWindows:
    windows = open_training_data(
        config.documents,
        tokenizer,
        config.context_length,
        config.seed,
        vocab_size,
        config.labels,
        scores,
    )
    for line in windows.remarks():
        _log.info("%s", line)
    return windows


def _result(folder: Path, steps: int) -> RunResult:
    records = read_log(folder / LOG_NAME)
    return RunResult(
        folder=folder,
        steps=steps,
        seconds_per_step=[record["seconds"] for record in records if "seconds" in record],
        peak_memory_bytes=max((r.get("peak_memory_bytes", 0) for r in records), default=0),
        final_loss=records[-1]["loss"] if records else math.nan,
    )
