"""The demo from beginning to end: base model, fine-tunings, evaluation, report."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lemo.cli.streams import printable
from lemo.data import ExampleWindows
from lemo.data.rows import read_rows
from lemo.data.training_data import encode_examples
from lemo.demo.base import BaseConfig, train_base
from lemo.demo.corpus import train_tokenizer, write_corpus
from lemo.demo.facts import Prompter, write_prompts
from lemo.demo.relevance import explain
from lemo.files import LOCK_NAME, json_text, write_file
from lemo.report import load_run, write_report
from lemo.settings.elimination import LemoConfig
from lemo.settings.finetune import FinetuneConfig
from lemo.training.answers import evaluate_answers
from lemo.training.metrics import write_metrics
from lemo.training.run_folder import METRICS_NAME, RELEVANCE_NAME
from lemo.training.run_report import REPORT_NAME, remove_report

MIB = 2**20

# Run folders of the fine-tunings, and what the table calls them.
METHODS = {"dense": "dense LoRA", "lemo_steps": "lemo, same steps", "lemo": "lemo, same time"}

# Steps are not all as fast as their median.
_MARGIN = 0.9


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """Sizes of the demo; the defaults take a few minutes on two cores.

    Attributes:
        base: the base model.
        context: tokens of a prompt after the extension.
        facts: facts in a prompt.
        asked: questions of a prompt.
        steps: fine-tuning steps of dense LoRA; lemo takes as many, and then in a run of its own as
            many as fit into the same time.
        batch: prompts of a step.
        keep: share of the blocks that lemo keeps.
        block_size: tokens of a block, as a share of a prompt.
        seed: of the prompts, the base model and the fine-tunings.
        learning_rate: of the fine-tunings.
        lora_rank: of the fine-tunings.
        prompts: prompts to fine-tune on.
        held_out: prompts of the evaluation.
        held_out_sources: sources that these are made of, and no other prompts.
        corpus_limit: characters of all sources, None for the whole standard library.
    """

    base: BaseConfig = dataclasses.field(default_factory=BaseConfig)
    context: int = 4096
    facts: int = 8
    asked: int = 4
    steps: int = 30
    batch: int = 1
    keep: float = 0.25
    block_size: float = 1 / 32
    seed: int = 0
    learning_rate: float = 2e-3
    lora_rank: int = 16
    prompts: int = 160
    held_out: int = 24
    held_out_sources: int = 8
    corpus_limit: int | None = 4_000_000

    @classmethod
    def quick(cls) -> DemoSettings:
        """Seconds instead of minutes, to see that everything runs; its figures mean nothing."""
        return cls(
            base=BaseConfig(
                vocabulary=384,
                hidden=32,
                intermediate=64,
                layers=3,
                heads=2,
                key_value_heads=1,
                context=192,
                first_context=96,
                batch_tokens=384,
                steps=4,
            ),
            context=512,
            facts=3,
            asked=2,
            steps=3,
            lora_rank=4,
            prompts=6,
            held_out=3,
            held_out_sources=2,
            corpus_limit=400_000,
        )

    @property
    def elimination(self) -> LemoConfig:
        """The settings of lemo."""
        return LemoConfig(keep=self.keep, block_size=self.block_size, scorer="lexical")


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
        """What the run took beside what was there before it."""
        return self.peak_bytes - self.baseline_bytes

    @property
    def step_seconds(self) -> float:
        """The median of the steps."""
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
    def __init__(self, progress: Progress, task: TaskID):
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
    remove_report(output / REPORT_NAME)
    write_file(marker, json_text({"settings": dataclasses.asdict(settings)}, indent=2))
    screen = _Screen(console)
    base = dataclasses.replace(settings.base, seed=settings.seed)

    with screen.stage("Sources, tokenizer, prompts") as stage:
        # A token is about three characters; a source has to fill the longest prompt.
        train, held_out = write_corpus(
            output / "corpus",
            settings.held_out_sources,
            5 * settings.context,
            settings.corpus_limit,
        )
        tokenizer = train_tokenizer(train, base.vocabulary)
        prompts = _write_prompts(output / "corpus", train, held_out, tokenizer, settings)
        stage.outcome = f"{train.stat().st_size / 1e6:.1f} MB of Python"

    _train_base(output / "base", prompts, tokenizer, base, screen)
    results = _fine_tune_all(output, prompts, settings, screen)
    with screen.stage("Evaluation, dense, on held-out sources") as stage:
        answers = evaluate_all(output, prompts.held_out, settings, stage)

    picture = explain(
        output / "base", prompts.held_out, tokenizer, settings.elimination, settings.context
    )
    write_file(output / "lemo" / RELEVANCE_NAME, json_text(picture, indent=2))
    runs = [load_run(output / name, title) for name, title in METHODS.items()]
    note = (
        f"A model of {settings.base.context} tokens answers questions about facts that are planted "
        f"in Python sources of {settings.context} tokens: before, after dense LoRA (LoRA on every "
        "token), and after lemo, for as many steps and for about the same time."
    )
    page = write_report(runs, output / REPORT_NAME, [answers["before"]], note)
    content = {
        "settings": dataclasses.asdict(settings),
        "results": [dataclasses.asdict(result) for result in results.values()],
        "answers": answers,
    }
    write_file(marker, json_text(content, indent=2))
    console.print(result_table(settings, results, answers))
    console.print(printable(f"Report: {page}"), soft_wrap=True, markup=False, highlight=False)
    return page


def _train_base(
    folder: Path,
    prompts: _Prompts,
    tokenizer: PreTrainedTokenizerFast,
    base: BaseConfig,
    screen: _Screen,
) -> None:
    with screen.stage(f"Base model, dense, {base.context} tokens") as stage:

        def note(step: int, loss: float) -> None:
            stage.update(step, base.steps, f"loss {loss:.3f}")
            stage.outcome = f"loss of the answers {loss:.3f}"

        windows = {
            length: ExampleWindows(encode_examples(read_rows(path), tokenizer), length)
            for length, path in prompts.base.items()
        }
        train_base(folder, windows, tokenizer, base, note)


def _fine_tune_all(
    output: Path, prompts: _Prompts, settings: DemoSettings, screen: _Screen
) -> dict[str, MethodResult]:
    """What every method cost, by its name."""
    results: dict[str, MethodResult] = {}
    for name, title in METHODS.items():
        with screen.stage(f"Fine-tuning to {settings.context} tokens, {title}") as stage:
            steps = settings.steps
            if name == "lemo":
                seconds = sum(results["dense"].seconds_per_step)
                steps = max(1, int(_MARGIN * seconds / results["lemo_steps"].step_seconds))
            config = FinetuneConfig(
                model=str(output / "base"),
                documents=str(prompts.train),
                output=str(output / name),
                context_length=settings.context,
                steps=steps,
                batch_size=settings.batch,
                learning_rate=settings.learning_rate,
                warmup_steps=min(4, steps - 1),
                lora_rank=settings.lora_rank,
                lora_alpha=2.0 * settings.lora_rank,
                train_norms=True,
                save_every=steps,
                overwrite=True,
                # All methods and their figures are about the CPU, also where there is a GPU.
                device="cpu",
                elimination=None if name == "dense" else settings.elimination,
                seed=settings.seed,
            )
            results[name] = run_method(name, config, output / f"{name}.yaml", stage)
            stage.outcome = f"{steps} steps of {results[name].step_seconds:.2f} s"
    return results


@dataclasses.dataclass(frozen=True)
class _Prompts:
    """Files of prompts: of the base model by their length, to fine-tune on, to evaluate on."""

    base: dict[int, Path]
    train: Path
    held_out: Path


def _write_prompts(
    folder: Path,
    train: Path,
    held_out: Path,
    tokenizer: PreTrainedTokenizerBase,
    settings: DemoSettings,
) -> _Prompts:
    base = settings.base
    prompter = Prompter(train, tokenizer, settings.seed)
    of_base = {}
    for length in (base.first_context, base.context):
        of_base[length] = folder / f"base_{length}.jsonl"
        steps = sum(base.context_of(step) == length for step in range(base.steps))
        count = steps * max(1, base.batch_tokens // length)
        # Short prompts have no room for all facts.
        facts = min(settings.facts, max(1, length // 16))
        asked = min(settings.asked, facts)
        write_prompts(of_base[length], prompter, count, length, facts, asked)
    long, evaluated = folder / "prompts.jsonl", folder / "heldout_prompts.jsonl"
    size = (settings.context, settings.facts, settings.asked)
    write_prompts(long, prompter, settings.prompts, *size)
    unseen = Prompter(held_out, tokenizer, settings.seed + 1)
    write_prompts(evaluated, unseen, settings.held_out, *size)
    return _Prompts(of_base, long, evaluated)


def _is_empty(folder: Path) -> bool:
    return {entry.name for entry in folder.iterdir()} <= {LOCK_NAME}


def _is_demo(marker: Path) -> bool:
    try:
        return "settings" in json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def run_method(name: str, config: FinetuneConfig, config_path: Path, stage: _Stage) -> MethodResult:
    """Fine-tune in a fresh process, so that no method pays for the memory of another.

    Raises:
        ChildProcessError: the process failed; the message ends with its own.
    """
    write_file(config_path, yaml.safe_dump(config.to_dict(), sort_keys=False))
    command = [sys.executable, "-m", "lemo.demo.job", str(config_path)]
    baseline = 0
    records: list[dict[str, Any]] = []
    with (
        # A file, not a pipe: nobody reads it while the process runs.
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        assert process.stdout is not None
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
) -> dict[str, dict[str, Any]]:
    """Exact answers before fine-tuning and after each one.

    Returns:
        ``{"before" or a name of METHODS: {"exact", "right_tokens", "perplexity", ...}}``.
    """
    found = {}
    names = ("before", *METHODS)
    for index, name in enumerate(names):

        def note(done: int, total: int, name: str = name, index: int = index) -> None:
            stage.update(index * total + done, len(names) * total, name)

        rows = evaluate_answers(
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
    before = found["before"]
    stage.outcome = f"{before['answers']} answers in {before['documents']} prompts"
    return found


def result_table(
    settings: DemoSettings,
    results: dict[str, MethodResult],
    answers: dict[str, dict[str, Any]],
) -> Table:
    """All methods side by side, and the model before."""
    table = Table(
        title=f"Answers to prompts of {settings.context} tokens, by a model of "
        f"{settings.base.context} tokens"
    )
    for column in ("", "before", *METHODS.values()):
        table.add_column(column, justify="left" if column == "" else "right")
    dense = results["dense"]

    def costs(label: str, text: str, value: Callable[[MethodResult], float], ratio: bool) -> None:
        cells = []
        for result in results.values():
            cell = text.format(value(result))
            if ratio and result is not dense and value(dense) > 0:
                cell += f" ({value(result) / value(dense):.2f}x)"
            cells.append(cell)
        table.add_row(label, "", *cells)

    costs("steps", "{:.0f}", lambda result: len(result.seconds_per_step), False)
    costs("seconds a step (median)", "{:.2f}", lambda result: result.step_seconds, True)
    costs("seconds, all steps", "{:.0f}", lambda result: sum(result.seconds_per_step), True)
    costs("memory of the training (MiB)", "{:.0f}", lambda r: r.memory_bytes / MIB, True)
    costs("token rows taking part", "{:.0%}", lambda result: result.kept_share, False)
    for label, field, text in (
        ("exact answers, held out", "exact", "{:.0%}"),
        ("perplexity of the answers", "perplexity", "{:.2f}"),
    ):
        table.add_row(label, *(text.format(answers[name][field]) for name in ("before", *METHODS)))
    baseline = max(result.baseline_bytes for result in results.values()) / MIB
    table.caption = (
        f"Memory: highest resident memory above the {baseline:.0f} MiB of the imported libraries. "
        f"Answers: {answers['before']['answers']}, every token present."
    )
    return table
