"""One fine-tuning step of a long window, by lemo and by what a user would pick instead, on one GPU.

    python benchmarks/comparison.py [--lengths 8192 32768 65536 131072] [--only NAME ...]
        [--output FILE.jsonl] [--shape llama-3-8b] [--memory GIB] [--timeout S] [--step-limit S]
        [--deadline S] [--ahead N] [--again]
    python benchmarks/comparison.py --device cpu --shape tiny --lengths 256 --output /dev/null

Measured: seconds of an optimizer step, and the most memory that it takes on the GPU and of the
host. The contenders are those of `contenders.py`, each at the best settings that its authors
publish. All train the same model, random weights of a known shape in bf16, with LoRA of rank 8 on
q, k, v and o, on the same tokens with the same loss, the mean over all next tokens, by fused AdamW,
batch 1. Random weights are right for time and memory and meaningless for quality. A NAME
may be bound to one length: "liger@131072".

Every measurement is a process of its own. While one measures, the next ones import their packages
and wait; they compute nothing on the GPU before their turn. A process first runs a step of at most
8192 tokens, which compiles what has to be compiled. Of the steps of full length the first one does
not count, unless it takes more than 20 s (--long-step), a shorter step went before it, and it pins
no memory of the host, which takes seconds once; then it is the measurement, and "warmed" of the row
is false. Else there are 3 up to 16384 tokens, 2 up to 65536, and 1 beyond (--steps: so many of
them).

Rows are appended to --output as soon as they are measured. What is there for the same contender,
length, shape, memory, GPU and commit is not measured again (--again: it is). A contender that runs
out of memory, or does not run, is a row with the reason in "failed". Longer windows are not tried
after out of memory, and not where a step would take longer than --step-limit, judged by the last
length and the square of the length. `comparison_page.py` writes tables and plots from the rows.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from common import records
from common.processes import MEASURE, Worker, WorkerError, run_script
from contenders import CONTENDERS, Built
from gpu_finetune import ENVIRONMENT, GIB, RANK, TARGETS

# What a shape is called, and its number of layers.
SHAPES = {
    "llama-3-8b": ("Llama-3-8B shape", 32),
    "qwen3-8b": ("Qwen3-8B shape", 36),
    "tiny": ("tiny shape", 2),
}
LENGTHS = (8192, 32768, 65536, 131072)
OUTPUT = records.RESULTS / "comparison.jsonl"
# The largest length of a number of measured steps.
STEPS = ((16384, 3), (65536, 2))
WARM_UP_TOKENS = 8192
OUT_OF_MEMORY = "out of memory"
ALWAYS = ("torch", "transformers", "peft")
# No look at the network, no folder of generated code in the working directory.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "UNSLOTH_COMPILE_LOCATION": "/tmp/comparison_unsloth",
    "UNSLOTH_DISABLE_STATISTICS": "1",
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = records.parser(__doc__, OUTPUT)
    count, above_zero, from_zero = records.at_least(1), records.above_zero, records.from_zero
    lengths = {"type": records.at_least(2), "nargs": "+", "metavar": "TOKENS"}
    parser.add_argument("--lengths", **lengths, default=list(LENGTHS))
    parser.add_argument("--only", nargs="+", metavar="NAME[@TOKENS]", help="in this order")
    parser.add_argument("--without", nargs="+", choices=CONTENDERS, metavar="NAME", default=[])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--layers", type=count, help="the shape's own number where left out")
    parser.add_argument("--steps", type=count, help="that count; by the length where left out")
    parser.add_argument("--long-step", type=from_zero, default=20.0, help="seconds of a first step")
    parser.add_argument("--memory", type=above_zero, help="GiB of the GPU that PyTorch may take")
    parser.add_argument(
        "--timeout", type=above_zero, default=300.0, help="seconds of a measurement"
    )
    parser.add_argument("--step-limit", type=above_zero, default=120.0, help="seconds of a step")
    parser.add_argument("--deadline", type=from_zero, help="seconds after which none is begun")
    parser.add_argument(
        "--ahead", type=records.at_least(0), default=3, help="processes that import and wait"
    )
    parser.add_argument("--again", action="store_true", help="also what --output has")
    parser.add_argument("--logs", type=Path, default=records.BUILD / "comparison")
    parser.add_argument("--device", type=records.device, default="cuda")
    options = parser.parse_args(arguments)
    if options.memory is not None and not options.device.startswith("cuda"):
        parser.error("--memory: expected a GPU, whose memory is capped, got --device cpu")
    wanted = [each.partition("@")[::2] for each in options.only or CONTENDERS]
    for name, at in wanted:
        if name not in CONTENDERS or at not in ("", *map(str, options.lengths)):
            parser.error(
                f"--only: expected names among {', '.join(CONTENDERS)}, alone or with one of "
                f"--lengths behind an @, got {name}{at and '@' + at}"
            )
    options.only = [(name, at) for name, at in wanted if name not in options.without]
    return options


# --- one measurement: a process of its own


def worker(settings: dict[str, Any]) -> Callable[[str], dict[str, Any]]:
    """Imports what a contender needs, and measures its steps when it is asked to."""
    return answering(settings, lambda _: measured(settings))


def answering(
    settings: dict[str, Any], measure: Callable[[str], dict[str, Any]]
) -> Callable[[str], dict[str, Any]]:
    """Imports what a contender needs; then answers as `measure` does, or with what failed."""
    contender = CONTENDERS[settings["contender"]]
    try:
        contender.load()
        import torch  # noqa: F401
    except Exception as error:
        traceback.print_exc()
        failed = {"failed": reason(error)}
        return lambda _: failed

    def answer(question: str) -> dict[str, Any]:
        found: dict[str, Any] = {"versions": versions(contender.packages)}
        try:
            return found | measure(question)
        except Exception as error:
            traceback.print_exc()
            return found | {"failed": reason(error)} | held(settings["device"])

    return answer


def reason(error: Exception) -> str:
    """What a row says of an error: its kind and first line."""
    from lemo.memory_errors import is_out_of_memory

    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of the packages that are installed; lemo's is the commit."""
    found = {}
    for package in (*ALWAYS, *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


class Steps:
    """Training steps of one contender, on random tokens.

    Args:
        settings: of a worker: contender, shape, layers, memory, device, and where the weights are
            stored in 4 bits, "quantize": "nf4".
        tokens: of the longest window.
        build: in place of the contender's own.
    """

    def __init__(
        self, settings: dict[str, Any], tokens: int, build: Callable[..., Built] | None = None
    ) -> None:
        import torch

        from common.models import config_of_shape

        self.device = settings["device"]
        contender = CONTENDERS[settings["contender"]]
        on_gpu = self.device.startswith("cuda")
        if settings["memory"] is not None and on_gpu:
            share = settings["memory"] * GIB / torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(share)
        config = config_of_shape(settings["shape"], tokens, settings["layers"])
        config.quantize = settings.get("quantize")
        self._built = (build or contender.build)(config, self.device, tokens)
        self.weights = torch.cuda.memory_allocated() if on_gpu else 0
        parameters = [each for each in self._built.model.parameters() if each.requires_grad]
        self._optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        generator = torch.Generator().manual_seed(0)
        shape = (1, min(tokens, contender.settings.get("window", tokens)))
        ids = torch.randint(0, config.vocab_size, shape, generator=generator)
        self._ids = ids.to(self.device)
        self.losses: list[Any] = []

    @property
    def trained_tokens(self) -> int:
        """Tokens of the longest window that are trained."""
        return self._ids.shape[1]

    def seconds(self, tokens: int | None = None) -> float:
        """The time of a step on so many tokens; None: on all."""
        from common.timing import milliseconds

        return milliseconds(lambda: self._step(self._ids[:, :tokens]), self.device) / 1e3

    def _step(self, ids: Any) -> None:
        with self._built.around():
            loss = self._built.loss(ids)
            loss.backward()
        self._optimizer.step()
        self.forget()
        self.losses.append(loss.detach())

    def forget(self) -> None:
        """Drops gradients."""
        self._optimizer.zero_grad(set_to_none=True)


def measured(settings: dict[str, Any]) -> dict[str, Any]:
    """Time and memory of steps of one contender."""
    from common.timing import summary

    steps = Steps(settings, settings["tokens"])
    short = settings["warm_up_tokens"]
    compiled = short < steps.trained_tokens
    if compiled:
        steps.seconds(short)
    times: list[float] = []
    # Before its end it is not known whether the first step counts.
    reset_peak(steps.device)
    first = steps.seconds()
    pinned = held(steps.device).get("pinned_gib", 0.0)
    warmed = first <= settings["long_step"] or pinned > 0 or not compiled
    if not warmed:
        times.append(first)
    elif first <= settings["long_step"]:
        # The second one of its shape: CUDA graphs are captured in it.
        steps.seconds()
    while warmed and len(times) < settings["steps"]:
        if not times:
            reset_peak(steps.device)
        times.append(steps.seconds())
    counted = summary(times, digits=4)
    return {
        "step_s": round(counted.median, 4),
        "range": counted.range,
        "steps": len(times),
        "warmed": warmed,
        "trained_tokens": steps.trained_tokens,
        "loss": round(steps.losses[1 if compiled else 0].item(), 4),
        "weights_gib": round(steps.weights / GIB, 2),
        **held(steps.device),
    }


def reset_peak(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def held(device: str) -> dict[str, float]:
    """The most memory of the GPU, of the whole process on the host, and pinned host memory."""
    import resource

    import torch

    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    found = {"host_gib": round(host, 2)}
    if not device.startswith("cuda") or not torch.cuda.is_initialized():
        return found
    torch.cuda.synchronize()
    stats = torch.cuda.host_memory_stats()
    return {
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2),
        "pinned_gib": round(stats.get("allocated_bytes.peak", 0) / GIB, 2),
        **found,
    }


# --- all measurements: the process that drives them


class Comparison:
    """Measures what options ask for, the next processes always started ahead."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._began = time.monotonic()
        # This process leaves the GPU alone, too.
        gpu = card(options.device)
        self._common = records.provenance(options.commit, "cpu") | {"gpu": gpu}
        # What is known of a contender: the last row of each that was measured or found.
        self._known: dict[str, dict[str, Any]] = {}
        self._rows = [row for row in records.read(options.output, "comparison") if self._same(row)]

    def run(self) -> int:
        """Measures and appends; the number of contenders that failed otherwise than by memory."""
        with contextlib.ExitStack() as stack:
            return self._run(stack)

    def _run(self, stack: contextlib.ExitStack) -> int:
        jobs = [
            (name, tokens)
            for tokens in self._options.lengths
            for name, at in self._options.only
            if at in ("", str(tokens))
        ]
        waiting: dict[tuple[str, int], Worker] = {}
        failures = 0
        for index, job in enumerate(jobs):
            name, tokens = job
            why_not = self._why_not(*job)
            if why_not is not None:
                print(f"{tokens:>8} {name:<20} not measured: {why_not}", flush=True)
                continue
            for other in jobs[index : index + 1 + self._options.ahead]:
                if other not in waiting and (other == job or self._why_not(*other) is None):
                    waiting[other] = stack.enter_context(self._start(*other))
            worker = waiting.pop(job)
            row = self._measured(name, tokens, worker)
            records.append(self._options.output, [row])
            self._known[name] = row
            failures += row.get("failed") not in (None, OUT_OF_MEMORY)
            print(f"{tokens:>8} {name:<20} {text_of(row)}", flush=True)
        return failures

    def _measured(self, name: str, tokens: int, worker: Worker) -> dict[str, Any]:
        try:
            result = worker.ask(MEASURE, self._options.timeout)
        except WorkerError as error:
            result = {"failed": str(error)}
        # The GPU is free only when the process has ended.
        worker.close()
        contender = CONTENDERS[name]
        return {
            "bench": "comparison",
            "contender": name,
            "tokens": tokens,
            "step_s": None,
            "range": None,
            "peak_gib": None,
            "host_gib": None,
            "keep": contender.keep,
            "memory": self._options.memory,
            "shape": self._shape(),
            "settings": dict(contender.settings),
            **result,
            **self._common,
        }

    def _start(self, name: str, tokens: int) -> Worker:
        options = self._options
        settings = {
            "contender": name,
            "tokens": tokens,
            "shape": options.shape,
            "layers": options.layers,
            "memory": options.memory,
            "device": options.device,
            "steps": options.steps or steps_of(tokens),
            "warm_up_tokens": WARM_UP_TOKENS,
            "long_step": options.long_step,
        }
        options.logs.mkdir(parents=True, exist_ok=True)
        log = options.logs / f"{name}-{tokens}.log"
        return Worker(__file__, settings, ENVIRONMENT | QUIET, log)

    def _why_not(self, name: str, tokens: int) -> str | None:
        """Why a measurement is left out; None where it is not."""
        options = self._options
        if CONTENDERS[name].why_not is not None:
            return CONTENDERS[name].why_not
        if CONTENDERS[name].settings.get("window") == tokens:
            return "its window is the whole of it, as in 'plain'"
        if options.deadline is not None and time.monotonic() - self._began > options.deadline:
            return f"{options.deadline:g} s are over"
        there = [row for row in self._rows if (row["contender"], row["tokens"]) == (name, tokens)]
        if there and not options.again:
            self._known.setdefault(name, there[-1])
            return "--output has it"
        last = self._known.get(name)
        if last is None or last["tokens"] > tokens:
            return None
        if last.get("failed"):
            return f"{last['failed']} at {last['tokens']}"
        growth = (tokens / last["tokens"]) ** 2
        if (
            "window" not in CONTENDERS[name].settings
            and last["step_s"] * growth > options.step_limit
        ):
            return f"a step would take up to {last['step_s'] * growth:.0f} s"
        return None

    def _shape(self) -> dict[str, Any]:
        model, layers = SHAPES[self._options.shape]
        return {
            "model": model,
            "layers": self._options.layers or layers,
            "lora_rank": RANK,
            "lora_targets": ",".join(name.removesuffix("_proj") for name in TARGETS),
            "dtype": "bfloat16",
            "batch": 1,
        }

    def _same(self, row: dict[str, Any]) -> bool:
        """Whether a row is of the same model, card and code."""
        here = {"shape": self._shape(), "memory": self._options.memory}
        here |= {name: self._common[name] for name in ("gpu", "commit")}
        return all(row.get(name) == value for name, value in here.items())


def card(device: str) -> str | None:
    """The GPU's name as PyTorch has it; None: no GPU is asked for.

    Raises:
        SystemExit: the driver's tool knows no GPU.
    """
    if not device.startswith("cuda"):
        return None
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        names = ""
    if not names.strip():
        raise SystemExit(f"--device: expected a GPU that nvidia-smi lists, got {device}, and none")
    return names.strip().splitlines()[0]


def steps_of(tokens: int) -> int:
    """Measured steps of a length."""
    return next((steps for longest, steps in STEPS if tokens <= longest), 1)


def text_of(row: dict[str, Any]) -> str:
    """A row in a line."""
    if row.get("failed"):
        return row["failed"]
    memory = "" if row["peak_gib"] is None else f"{row['peak_gib']:>8} GiB"
    return f"{row['step_s']:>10} s {memory} host {row['host_gib']} GiB, loss {row['loss']}"


def main() -> int:
    options = parse_arguments()
    # Who ends this process ends the measurement, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    return 1 if Comparison(options).run() else 0


if __name__ == "__main__":
    run_script(main, worker)
