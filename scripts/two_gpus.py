"""Trains in every way that docs/MULTI_GPU.md names, on two GPUs of one host and on one.

    python scripts/two_gpus.py --model FOLDER --documents FILE [--only TEXT ...] [--jobs 3]

`lemo finetune` is started with torchrun, Trainer and TRL's SFTTrainer with accelerate launch, which
shards the weights wherever processes share out rows: it has no other way to do that. A run
of two processes has to give the losses of the run of one process on the same windows, which
accumulates the passes of both: that of its first step within --first (relative; bf16 products in
another order, with the weights as they were), those of the later steps within --later.

Prints a line for each check, the first error of each failed run, and in the end a verdict; exits
with 1 where a check fails. With --device cpu, without what accelerate does on GPUs alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

LAYER = "LlamaDecoderLayer"
# Passes of an optimizer step, of all processes together.
PASSES = 2
LINES_OF_FAILED = 40
# How errors begin: lemo's, Python's, those of NCCL and of torch's C++ code.
ERROR = re.compile(r"lemo: error|Traceback \(most recent|\[E\d|terminate called")
# What torch writes in front of a line of one of several processes.
RANK = re.compile(r"^\[rank\d+\]: ?")


@dataclass(frozen=True)
class Run:
    """A training.

    Attributes:
        name: of the run.
        by: finetune, Trainer or SFTTrainer.
        like: the run of one process that has the same losses; "": this is one.
        settings: options of `lemo finetune`, or of accelerate launch.
        groups: processes that share out the kept rows of a sequence.
        on_cpu: whether it can be started without GPUs.
    """

    name: str
    by: str
    like: str = ""
    settings: tuple[str, ...] = ()
    groups: int = 1
    on_cpu: bool = True

    @property
    def processes(self) -> int:
        return 2 if self.like else 1

    @property
    def passes(self) -> int:
        """Of a process in an optimizer step."""
        return PASSES // (self.processes // self.groups)


SHARDED = (
    "--use_fsdp",
    *("--fsdp_version", "2"),
    *("--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
    *("--fsdp_transformer_layer_cls_to_wrap", LAYER),
    *("--fsdp_cpu_ram_efficient_loading", "false"),
    *("--fsdp_state_dict_type", "FULL_STATE_DICT"),
)
NF4 = ("--quantize", "nf4")
CONTEXT = ("--context-parallel", "2")
RUNS = (
    Run("finetune", "finetune"),
    Run("finetune, nf4", "finetune", settings=NF4),
    Run("Trainer", "Trainer"),
    Run("SFTTrainer", "SFTTrainer"),
    Run("finetune, data", "finetune", "finetune"),
    Run("finetune, sharded", "finetune", "finetune", ("--shard",)),
    Run("finetune, nf4, sharded", "finetune", "finetune, nf4", (*NF4, "--shard")),
    Run("finetune, context", "finetune", "finetune", CONTEXT, 2),
    Run("finetune, context, sharded", "finetune", "finetune", (*CONTEXT, "--shard"), 2),
    Run("finetune, nf4, context", "finetune", "finetune, nf4", (*NF4, *CONTEXT), 2),
    Run("Trainer, data", "Trainer", "Trainer"),
    Run("Trainer, sharded", "Trainer", "Trainer", SHARDED, on_cpu=False),
    Run("Trainer, context", "Trainer", "Trainer", SHARDED, 2, on_cpu=False),
    Run("SFTTrainer, data", "SFTTrainer", "SFTTrainer"),
    Run("SFTTrainer, sharded", "SFTTrainer", "SFTTrainer", SHARDED, on_cpu=False),
    Run("SFTTrainer, context", "SFTTrainer", "SFTTrainer", SHARDED, 2, on_cpu=False),
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="of the Llama kind")
    parser.add_argument("--documents", required=True)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tokens", type=int, default=4096, help="of a sequence, at most")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--first", type=float, default=1e-3)
    parser.add_argument("--later", type=float, default=1e-2)
    parser.add_argument("--timeout", type=float, default=120.0, help="of a run, seconds")
    parser.add_argument("--jobs", type=int, default=3, help="runs at a time")
    parser.add_argument("--only", nargs="+", default=[], help="runs whose name has such a text")
    parser.add_argument("--member", help=argparse.SUPPRESS)  # a run that this process is part of
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    if options.member:
        by_trainer(next(run for run in RUNS if run.name == options.member), options)
        return 0
    runs = [run for run in RUNS if options.device == "cuda" or run.on_cpu]
    wanted = [run for run in runs if any(text in run.name for text in options.only or [""])]
    needed = {run.like or run.name for run in wanted}
    chosen = [run for run in runs if run in wanted or run.name in needed]
    with tempfile.TemporaryDirectory() as name:
        group = Group(options, Path(name))
        with ThreadPoolExecutor(options.jobs) as pool:
            found = dict(zip((run.name for run in chosen), pool.map(group.losses, chosen)))
    passed = [check(run, found, options) for run in chosen]
    print(f"VERDICT: {'passed' if all(passed) else 'FAILED'}, {sum(passed)} of {len(passed)} runs")
    return 0 if all(passed) else 1


def check(run: Run, found: dict[str, list[float]], options: argparse.Namespace) -> bool:
    losses = found[run.name]
    holds = len(losses) == options.steps
    shown = " ".join(f"{loss:.5f}" for loss in losses) or "no losses"
    if run.like and holds and len(found[run.like]) == options.steps:
        errors = [abs(got / one - 1) for got, one in zip(losses, found[run.like])]
        holds = errors[0] <= options.first and max(errors) <= options.later
        shown += f", off by {errors[0]:.1e} and then {max(errors[1:], default=0):.1e}"
    elif run.like:
        holds = False
    print(f"{'ok    ' if holds else 'FAILED'} {run.name}: {shown}", flush=True)
    return holds


def first_error(log: list[str]) -> list[str]:
    """The lines of the first error in a log, to the end of what was raised; none: its last lines.

    Launchers add theirs behind it, which say no more than which process ended first.
    """
    bare = [RANK.sub("", line) for line in log]
    begin = next((i for i, line in enumerate(bare) if ERROR.match(line)), None)
    if begin is None:
        return log[-LINES_OF_FAILED:]
    end = begin
    if bare[begin].startswith("Traceback"):
        frames = range(begin + 1, len(bare))
        # Those of several processes may be mixed.
        raised = (i for i in frames if bare[i][:1].strip() and not ERROR.match(bare[i]))
        end = next(raised, len(bare) - 1)
    # Messages have more lines than one.
    return log[max(begin, end + 6 - LINES_OF_FAILED) : end + 6]


class Group:
    """Starts runs; those of one process take turns on the two GPUs."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options, self._folder = options, folder
        self._lock, self._alone = threading.Lock(), 0

    def losses(self, run: Run) -> list[float]:
        """Of each step; none where the run failed."""
        folder = self._folder / run.name.replace(", ", "-")
        log = folder.with_suffix(".log")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        if run.processes == 1:
            with self._lock:
                environment["CUDA_VISIBLE_DEVICES"] = str(self._alone % 2)
                self._alone += 1
        begun = time.monotonic()
        with log.open("wb") as out:
            process = subprocess.Popen(
                self._command(run, folder), stdout=out, stderr=out, env=environment
            )
            try:
                code: int | None = process.wait(self._options.timeout)
            except subprocess.TimeoutExpired:
                # A launcher ends what it launched, which is in sessions of its own.
                process.terminate()
                process.wait()
                code = None
        print(f"       {run.name}: {time.monotonic() - begun:.0f} s", flush=True)
        if code != 0:
            said = first_error(log.read_text(errors="replace").splitlines())
            shown = [f"       | {line[:300]}" for line in said]
            print("\n".join([f"       {run.name} ended with {code}", *shown]), flush=True)
            return []
        lines = (folder / "log.jsonl").read_text().splitlines()
        return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]

    def _command(self, run: Run, folder: Path) -> list[str]:
        options = self._options
        two = ("--nproc_per_node", "2")
        if run.by == "finetune":
            launcher = ["-m", "torch.distributed.run", "--standalone", *two] if run.like else []
            given = {
                "model": options.model,
                "documents": options.documents,
                "output": folder,
                "context-length": options.tokens,
                "steps": options.steps,
                "gradient-accumulation": run.passes,
                "device": options.device,
            }
            named = [word for key, value in given.items() for word in (f"--{key}", str(value))]
            return [sys.executable, *launcher, "-m", "lemo", "finetune", *named, *run.settings]
        launcher = []
        if run.like and options.device == "cpu":
            launcher = ["-m", "torch.distributed.run", "--standalone", *two]
        elif run.like:
            # A port of 0: one that is free. Otherwise runs at the same time meet each other.
            launcher = ["-m", "accelerate.commands.launch", "--num_processes", "2"]
            launcher += ["--num_machines", "1", "--main_process_port", "0"]
            launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
            launcher += run.settings or ["--multi_gpu"]
        return [sys.executable, *launcher, *sys.argv, "--member", run.name, "--folder", str(folder)]


def by_trainer(run: Run, options: argparse.Namespace) -> None:
    """A process of a run of a trainer."""
    import torch
    from accelerate import ParallelismConfig
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from torch.distributed import get_rank, is_initialized
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
    )

    import lemo
    from lemo.data import read_documents

    on_gpu = options.device == "cuda"
    common: dict[str, Any] = {
        "output_dir": options.folder,
        "use_cpu": not on_gpu,
        "max_steps": options.steps,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": run.passes,
        "logging_steps": 1,
        "learning_rate": 2e-4,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "bf16": False,
    }
    mesh = None
    if run.groups > 1:
        common["parallelism_config"] = ParallelismConfig(cp_size=run.groups)
    settings = settings_of(run, common)
    device = settings.device  # begins the process group
    if run.groups > 1:
        mesh = settings.parallelism_config.get_device_mesh(device.type)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    dtype = torch.bfloat16 if on_gpu else torch.float32
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    base.config.use_cache = False
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
    handle = lemo.enable(model, lemo.LemoConfig(keep=0.5, scorer="random"), mesh)
    texts = [document.text for document in islice(read_documents(options.documents), 16)]
    # Lengths that differ, also between the processes.
    lengths = [options.tokens * (8 - step % 5) // 8 for step in range(len(texts))]
    rows = [
        tokenizer(text[: 8 * length], truncation=True, max_length=length)["input_ids"]
        for text, length in zip(texts, lengths)
    ]
    data = Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in rows])
    if run.by == "SFTTrainer":
        from trl import SFTTrainer

        trainer: Trainer = SFTTrainer(
            model,
            args=settings,
            train_dataset=data.remove_columns("labels"),
            processing_class=tokenizer,
        )
    else:
        trainer = Trainer(
            model, settings, train_dataset=data, data_collator=DataCollatorForSeq2Seq(tokenizer)
        )
    handle.attach(trainer)
    trainer.train()
    if not is_initialized() or get_rank() == 0:
        entries = [entry for entry in trainer.state.log_history if "loss" in entry]
        path = Path(options.folder) / "log.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    if is_initialized():
        torch.distributed.destroy_process_group()


def settings_of(run: Run, common: dict[str, Any]) -> Any:
    if run.by == "SFTTrainer":
        from trl import SFTConfig

        return SFTConfig(max_length=None, **common)
    from transformers import TrainingArguments

    return TrainingArguments(**common)


if __name__ == "__main__":
    sys.exit(main())
