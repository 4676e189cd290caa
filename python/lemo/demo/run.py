"""The demo from beginning to end: base model, two fine-tunings, evaluation, report."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lemo.cli.streams import printable
from lemo.demo.base import BaseConfig, train_base
from lemo.demo.corpus import train_tokenizer, write_corpus
from lemo.files import LOCK_NAME, write_file
from lemo.report import load_run, write_report
from lemo.settings.elimination import LemoConfig
from lemo.settings.finetune import FinetuneConfig
from lemo.training.evaluate import evaluate, write_metrics
from lemo.training.run_folder import METRICS_NAME

MIB = 2**20

# Steps are not all as fast as their median.
_MARGIN = 0.9


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demo; the defaults take a few minutes on two cores.

    Attributes:
        base: the base model.
        context: tokens of a window after the extension.
        steps: fine-tuning steps of dense LoRA; lemo takes as many as fit into the same time.
        trial_steps: steps of lemo that tell how long one takes.
        seed: of the base model and of the fine-tunings.
        learning_rate: of the fine-tunings.
        lora_rank: of the fine-tunings.
        held_out: documents of the evaluation.
        corpus_limit: characters of all documents, None for the whole standard library.
    """

    base: BaseConfig = dataclasses.field(default_factory=BaseConfig)
    context: int = 4096
    steps: int = 26
    trial_steps: int = 10
    seed: int = 0
    learning_rate: float = 2e-3
    lora_rank: int = 16
    held_out: int = 8
    corpus_limit: int | None = None

    @classmethod
    def quick(cls) -> DemoSettings:
        """Seconds instead of minutes, to see that everything runs; its figures mean nothing."""
        return cls(
            base=BaseConfig(
                vocabulary=384, hidden=32, intermediate=64, layers=3, heads=2, context=64, steps=3
            ),
            context=256,
            steps=4,
            trial_steps=2,
            lora_rank=4,
            held_out=2,
            corpus_limit=400_000,
        )


@dataclasses.dataclass(frozen=True)
class MethodResult:
    """What one fine-tuning cost.

    Attributes:
        name: also the name of its run folder.
        seconds_per_step: wall-clock seconds of each step.
        baseline_bytes: resident memory when all libraries were loaded, before the run.
        peak_bytes: highest resident memory of the steps.
        kept_share: mean share of the token rows that took part in a sub-block.
    """

    name: str
    seconds_per_step: list[float]
    baseline_bytes: int
    peak_bytes: int
    kept_share: float

    @property
    def memory_bytes(self) -> int:
        return self.peak_bytes - self.baseline_bytes

    @property
    def step_seconds(self) -> float:
        return statistics.median(self.seconds_per_step)


class _Screen:
    """What the demo shows while it works: a line for each stage, a bar for the one that runs."""

    def __init__(self, console: Console):
        self.console = console

    @contextlib.contextmanager
    def stage(self, title: str) -> Iterator[_Stage]:
        start = time.perf_counter()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[note]}"),
            TimeElapsedColumn(),
        )
        hidden = not self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=hidden) as progress:
            stage = _Stage(progress, progress.add_task(title, total=1, note=""))
            yield stage
        seconds = time.perf_counter() - start
        self.console.print(f"{title}  [dim]{stage.outcome}  {seconds:.0f} s[/dim]", markup=True)


class _Stage:
    def __init__(self, progress: Progress, task: int):
        self._progress, self._task = progress, task
        self.outcome = ""

    def update(self, done: float, total: float, note: str = "") -> None:
        self._progress.update(self._task, completed=done, total=total, note=note)


def run_demo(output: Path, settings: DemoSettings, console: Console) -> Path:
    """Run the whole demo and print its table.

    Args:
        output: folder for everything; an earlier demo in it is replaced.
        settings: all sizes.
        console: where to print.

    Returns:
        The path of the report's page.

    Raises:
        FileExistsError: ``output`` holds something that is no demo.
        ChildProcessError: a fine-tuning process failed.
    """
    marker = output / "demo.json"
    if output.exists() and not (output.is_dir() and (_is_empty(output) or _is_demo(marker))):
        raise FileExistsError(
            f"output: expected an empty folder or an earlier demo, got '{output}'"
        )
    (output / "corpus").mkdir(parents=True, exist_ok=True)
    write_file(marker, json.dumps({"settings": dataclasses.asdict(settings)}, indent=2) + "\n")
    screen = _Screen(console)
    base = dataclasses.replace(settings.base, seed=settings.seed)

    with screen.stage("Documents and tokenizer") as stage:
        # A token is about three characters; held-out documents must fill the long window.
        train, held_out = write_corpus(
            output / "corpus", settings.held_out, 5 * settings.context, settings.corpus_limit
        )
        tokenizer = train_tokenizer(train, base.vocabulary)
        stage.outcome = f"{train.stat().st_size / 1e6:.1f} MB of Python"

    with screen.stage(f"Base model, dense, {base.context} tokens") as stage:

        def note_base(step: int, loss: float) -> None:
            stage.update(step, base.steps, f"loss {loss:.3f}")
            stage.outcome = f"loss {loss:.3f}"

        train_base(output / "base", train, tokenizer, base, note_base)

    results = []
    # lemo with its defaults: half of the quarters of a window, drawn at random in each step.
    for name, elimination in (("dense", None), ("lemo", LemoConfig())):
        title = f"Fine-tuning to {settings.context} tokens, {name}"
        with screen.stage(title) as stage:
            config = FinetuneConfig(
                model=str(output / "base"),
                documents=str(train),
                output=str(output / name),
                context_length=settings.context,
                steps=settings.steps,
                learning_rate=settings.learning_rate,
                warmup_steps=min(4, settings.steps - 1),
                lora_rank=settings.lora_rank,
                lora_alpha=2.0 * settings.lora_rank,
                train_norms=True,
                save_every=settings.steps,
                overwrite=True,
                # Both methods and their figures are about the CPU, also where there is a GPU.
                device="cpu",
                elimination=elimination,
                seed=settings.seed,
            )
            if results:
                seconds = sum(results[0].seconds_per_step)
                steps = steps_in(seconds, config, output, settings, stage)
                config = config.replace(steps=steps, save_every=steps)
            results.append(run_method(name, config, output / f"{name}.yaml", stage))
            stage.outcome = f"{config.steps} steps of {results[-1].step_seconds:.2f} s"

    with screen.stage("Evaluation, dense, on held-out documents") as stage:
        perplexities = evaluate_all(output, held_out, settings, stage)

    page = write_report([load_run(output / "lemo"), load_run(output / "dense")], output / "report")
    content = {
        "settings": dataclasses.asdict(settings),
        "results": [dataclasses.asdict(result) for result in results],
        "perplexities": perplexities,
    }
    write_file(marker, json.dumps(content, indent=2) + "\n")
    console.print(result_table(settings, results, perplexities))
    console.print(printable(f"Report: {page}"), soft_wrap=True, markup=False, highlight=False)
    return page


def _is_empty(folder: Path) -> bool:
    return {entry.name for entry in folder.iterdir()} <= {LOCK_NAME}


def _is_demo(marker: Path) -> bool:
    try:
        return "settings" in json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def steps_in(
    seconds: float, config: FinetuneConfig, folder: Path, settings: DemoSettings, stage: _Stage
) -> int:
    """Steps of a fine-tuning that take no longer than `seconds`, by a few steps tried before.

    The schedule of the learning rate needs their number from the start.
    """
    trial = config.replace(
        output=str(folder / "trial"),
        steps=settings.trial_steps,
        warmup_steps=0,
        save_every=settings.trial_steps,
    )
    result = run_method("trial", trial, folder / "trial.yaml", stage)
    return max(1, int(_MARGIN * seconds / result.step_seconds))


def run_method(name: str, config: FinetuneConfig, config_path: Path, stage: _Stage) -> MethodResult:
    """Fine-tune in a fresh process, so that no method pays for the memory of another.

    Raises:
        ChildProcessError: the process failed; the message ends with its own.
    """
    write_file(config_path, yaml.safe_dump(config.to_dict(), sort_keys=False))
    command = [sys.executable, "-m", "lemo.demo.job", str(config_path)]
    baseline, records = 0, []
    with (
        # A file, not a pipe: nobody reads it while the process runs.
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        for line in process.stdout:
            record = json.loads(line)
            if "step" not in record:
                baseline = record["baseline_bytes"]
                continue
            records.append(record)
            stage.update(record["step"], config.steps, f"loss {record['loss']:.3f}")
        code = process.wait()
        errors.seek(0)
        message = errors.read().strip().rpartition("\n")[2]
    if code != 0:
        raise ChildProcessError(
            f"fine-tuning '{name}': exit code {code}: {message or 'no message'}"
        )
    return MethodResult(
        name=name,
        seconds_per_step=[record["seconds"] for record in records],
        baseline_bytes=baseline,
        peak_bytes=max(record["peak_memory_bytes"] for record in records),
        kept_share=statistics.fmean(record["kept_share"] for record in records),
    )


def evaluate_all(
    output: Path, held_out: Path, settings: DemoSettings, stage: _Stage
) -> dict[str, dict[str, float]]:
    """Perplexity at the long context before fine-tuning and after each one.

    Returns:
        ``{"before" | "dense" | "lemo": {"perplexity", "tail_perplexity", "documents", ...}}``.
    """
    found = {}
    for index, name in enumerate(("before", "dense", "lemo")):

        def note(done: int, total: int, name: str = name, index: int = index) -> None:
            stage.update(index * total + done, 3 * total, name)

        rows = evaluate(
            str(output / "base"),
            held_out,
            [settings.context],
            adapter=None if name == "before" else output / name,
            rope_scaling="linear",
            device="cpu",
            progress=note,
        )
        found[name] = rows[0]
        if name != "before":
            write_metrics(output / name / METRICS_NAME, rows)
    stage.outcome = f"{found['before']['documents']} windows of {settings.context} tokens"
    return found


def result_table(
    settings: DemoSettings,
    results: list[MethodResult],
    perplexities: dict[str, dict[str, float]],
) -> Table:
    """Both methods side by side, and the model before."""
    dense, lemo = results
    table = Table(title=f"{settings.base.context} -> {settings.context} tokens")
    for column in ("", "before", "dense LoRA", "lemo", "lemo / dense"):
        table.add_column(column, justify="left" if column == "" else "right")

    def costs(label: str, text: str, dense_value: float, lemo_value: float) -> None:
        ratio = f"{lemo_value / dense_value:.2f}" if dense_value > 0 else "-"
        values = (text.format(dense_value), text.format(lemo_value))
        table.add_row(label, "", *values, ratio)

    costs("seconds a step (median)", "{:.2f}", dense.step_seconds, lemo.step_seconds)
    counts = (len(dense.seconds_per_step), len(lemo.seconds_per_step))
    costs("steps in the same time", "{:.0f}", *counts)
    totals = (sum(dense.seconds_per_step), sum(lemo.seconds_per_step))
    costs("seconds, all steps", "{:.0f}", *totals)
    memory = (dense.memory_bytes / MIB, lemo.memory_bytes / MIB)
    costs("memory of the training (MiB)", "{:.0f}", *memory)
    costs("token rows taking part", "{:.0%}", dense.kept_share, lemo.kept_share)
    for label, field in (
        ("held-out perplexity", "perplexity"),
        ("  last quarter of the window", "tail_perplexity"),
    ):
        values = [perplexities[name][field] for name in ("before", "dense", "lemo")]
        ratio = f"{values[2] / values[1]:.3f}"
        table.add_row(label, *(f"{value:.2f}" for value in values), ratio)
    baseline = max(result.baseline_bytes for result in results) / MIB
    table.caption = (
        f"Memory: highest resident memory above the {baseline:.0f} MiB of the imported libraries. "
        "Perplexity: every token present."
    )
    return table
