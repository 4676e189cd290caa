"""Training steps on 1, 2, 4 and 8 GPUs of one host, in one call of a limited time.

    python benchmarks/scaling.py [--gpus 1 2 4 8] [--seconds 570] [--profile] [--only TEXT ...]

Measured: seconds of a training step (forward, backward, AdamW) of the Llama-3-8B and Qwen3-8B
shapes, random bf16 weights, LoRA of rank 8 on q, k, v and o, and the highest memory of a process:

    context    one sequence of 131072 or 1048576 tokens, whose kept rows the GPUs share out
    data       a sequence of 32768 tokens for each GPU, whole weights
    fsdp       the same with weights that FSDP2 shards

Every layer is recomputed, or ("auto") each does what the planner chooses for the GPU's memory.
A short step comes first. Then up to 3 whole steps are timed, fewer where they take long; the first
of them counts only if it is the only one.

Groups that fit on the host together run side by side on GPUs of their own (1, 2 and 4 of 8), the
largest alone. Each measures the settings in the order of their importance. A setting that is
predicted not to end in time, or that fails, is named and left out.

Appends a row for each setting to --output as soon as it is measured: those of multi_gpu.py, and
predicted_s, predicted_gib, modes, beside (GPUs that worked at the same time), gradient_norm (of the
first whole step) and run, which all rows of a call share. In the end losses are compared, and with
--profile rows of bench "overlap" say what of the communication ran beside computation, and what
kernels took.

On the CPU: --device cpu --shrink 16 --layers 2 --shorten 512.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import records

WORKER = "--worker"
GIB = 2**30
RANK, TARGETS = 8, ("q_proj", "k_proj", "v_proj", "o_proj")
NAMES = {"llama-3-8b": "Llama-3-8B", "qwen3-8b": "Qwen3-8B"}
COUNTS = (1, 2, 4, 8)
# Tokens of the step that warms up.
SHORT = 8192
# Whole steps, and the seconds after which no further one begins.
STEPS, ENOUGH = 3, 16.0
# Seconds that a group takes to start, and a setting beside its steps: weights, the short step.
START, MAKING = 35.0, 8.0
# GiB of a GPU that are left to NCCL, the context and what the allocator cannot use.
RESERVED = 6.0
# Losses of another number of GPUs differ by the order of sums of bf16 products, at most by so much.
ROUNDING = 2e-4
# Seconds behind the end after which a group is ended.
PATIENCE = 15.0
# States of a setting in a group.
BEGUN, DONE = "begun", "done"


@dataclass(frozen=True)
class Setting:
    """What is measured on every number of GPUs of `counts`."""

    bench: str
    shape: str
    tokens: int
    keep: float
    recompute: str = "layer"
    counts: tuple[int, ...] = COUNTS
    max_ctas: int = 0

    @property
    def name(self) -> str:
        name = f"{self.bench} {self.shape} {self.tokens} keep {self.keep:g} {self.recompute}"
        return f"{name} ctas {self.max_ctas}" if self.max_ctas else name


# The most important first.
SETTINGS = (
    Setting("context", "llama-3-8b", 131072, 0.5),
    Setting("context", "llama-3-8b", 131072, 1.0),
    Setting("context", "llama-3-8b", 1048576, 0.25, "auto", (4, 8)),
    Setting("data", "llama-3-8b", 32768, 0.5),
    Setting("data", "llama-3-8b", 32768, 1.0),
    Setting("context", "qwen3-8b", 131072, 0.5),
    Setting("context", "llama-3-8b", 1048576, 0.5, "auto", (4, 8)),
    Setting("context", "qwen3-8b", 1048576, 0.25, "auto", (8,)),
    Setting("fsdp", "llama-3-8b", 32768, 0.5),
    Setting("context", "llama-3-8b", 131072, 1.0, "auto"),
    Setting("context", "llama-3-8b", 1048576, 1.0, "auto", (8,)),
)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = records.parser(__doc__, records.RESULTS / "multi_gpu.jsonl")
    parser.add_argument("--gpus", type=int, nargs="+", help="numbers of GPUs (1 2 4 8 that exist)")
    parser.add_argument("--seconds", type=float, default=570.0, help="that all may take")
    parser.add_argument("--only", nargs="+", default=[], help="settings whose name has such a text")
    parser.add_argument(
        "--profile", nargs="*", metavar="TEXT", help="one step more, under the profiler (of all)"
    )
    parser.add_argument(
        "--ctas", type=int, nargs="+", default=[0], help="CTAs of NCCL's kernels at most (0: open)"
    )
    parser.add_argument("--traces", type=Path, help="folder in which traces are kept")
    parser.add_argument("--memory", type=float, help="GiB of a GPU (what it has)")
    parser.add_argument("--shrink", type=int, default=1, help="divides the sizes of a layer")
    parser.add_argument("--shorten", type=int, default=1, help="divides the tokens")
    parser.add_argument("--layers", type=int, help="of the model (its own)")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    options = parser.parse_args(arguments)
    if options.profile is not None and options.device == "cpu":
        parser.error("--profile: expected --device cuda, whose kernels are looked at, got cpu")
    if not wanted(options.only, COUNTS[-1]):
        names = "; ".join(setting.name for setting in SETTINGS)
        parser.error(f"--only: expected texts of these names, got {options.only}: {names}")
    return options


def wanted(only: Sequence[str], gpus: int, ctas: Sequence[int] = (0,)) -> list[Setting]:
    """The settings of a number of GPUs, of context parallelism once for each limit of CTAs."""
    chosen = [
        replace(setting, max_ctas=most)
        for setting in SETTINGS
        for most in (ctas if setting.bench == "context" and gpus > 1 else (0,))
        if has_one_of(only, setting)
    ]
    # Another number than the usual ones has the settings of the next smaller one.
    like = max(count for count in COUNTS if count <= gpus)
    return [setting for setting in chosen if like in setting.counts]


def has_one_of(texts: Sequence[str], setting: Setting) -> bool:
    """Whether a setting's name has one of these texts, or there are none."""
    return not texts or any(text in setting.name for text in texts)


def is_profiled(setting: Setting, gpus: int, options: argparse.Namespace) -> bool:
    return options.profile is not None and has_one_of(options.profile, setting)


# --- all groups


def main() -> int:
    options = parse_arguments()
    begun = time.time()
    here = _gpus_here(options)
    counts = sorted(set(options.gpus or [count for count in COUNTS if count <= here]))
    if not counts or counts[0] < 1 or counts[-1] > here:
        print(f"--gpus: expected numbers from 1 to {here}, which there are, got {counts}")
        return 2
    run = datetime.datetime.now().isoformat(timespec="seconds")
    phases, before = side_by_side(counts, here), len(records.read(options.output))
    missing: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for index, phase in enumerate(phases):
            ends = deadline(options, phases, index, begun)
            first, groups = 0, []
            for count in phase:
                group = Group(options, count, phase, first, run, Path(folder), ends)
                groups.append(group)
                first += count
            for group in groups:
                missing += group.finish()
    rows = [row for row in records.read(options.output)[before:] if row.get("run") == run]
    report(rows, missing)
    print(f"{time.time() - begun:.0f} s in all", flush=True)
    return 1 if missing or not rows or differing(rows) else 0


def _gpus_here(options: argparse.Namespace) -> int:
    if options.device == "cpu":
        return max(options.gpus or COUNTS)
    import torch

    return torch.cuda.device_count()


def side_by_side(counts: Sequence[int], here: int) -> list[list[int]]:
    """Numbers of GPUs, ascending, in phases: those of a phase fit on the host together."""
    phases: list[list[int]] = []
    for count in counts:
        if phases and sum(phases[-1]) + count <= here:
            phases[-1].append(count)
        else:
            phases.append([count])
    return phases


def deadline(
    options: argparse.Namespace, phases: Sequence[Sequence[int]], index: int, begun: float
) -> float:
    """When a phase has to end: what those behind it need of the time is theirs, up to half."""
    ends = begun + options.seconds
    now = time.time()
    later = sum(
        max(
            START
            + sum(
                seconds_of(setting, count, options)
                for setting in wanted(options.only, count, options.ctas)
            )
            for count in phase
        )
        for phase in phases[index + 1 :]
    )
    return max(ends - later, now + (ends - now) / 2) if later else ends


class Group:
    """Processes on GPUs of their own, which measure one setting after the other."""

    def __init__(
        self,
        options: argparse.Namespace,
        count: int,
        phase: Sequence[int],
        first: int,
        run: str,
        folder: Path,
        ends: float,
    ) -> None:
        self._left = [setting.name for setting in wanted(options.only, count, options.ctas)]
        self._count, self._ends, self._options = count, ends, options
        self._log = folder / f"{count}.jsonl"
        self._gpus = ",".join(str(gpu) for gpu in range(first, first + count))
        beside = [other for other in phase if other != count]
        known = {
            key: str(value) if isinstance(value, Path) else value
            for key, value in vars(options).items()
        }
        self._settings = known | {"run": run, "beside": beside, "ends": ends, "log": str(self._log)}
        self._missing: list[str] = []
        self._process = self._started()

    def _started(self) -> subprocess.Popen[bytes]:
        environment = dict(os.environ)
        if self._options.device == "cuda":
            visible = environment.get("CUDA_VISIBLE_DEVICES")
            here = visible.split(",") if visible else None
            numbers = [here[int(gpu)] if here else gpu for gpu in self._gpus.split(",")]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(numbers)
            environment.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        settings = json.dumps(self._settings | {"left": self._left})
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        command = [sys.executable, *launcher, str(self._count), __file__, WORKER, settings]
        return subprocess.Popen(command, env=environment)

    def finish(self) -> list[str]:
        """Waits for the end; what was not measured, and why."""
        while True:
            try:
                code = self._process.wait(max(self._ends + PATIENCE - time.time(), 1))
            except subprocess.TimeoutExpired:
                self._process.terminate()  # torchrun ends its workers
                self._process.wait()
                code = None
            states = {entry["name"]: entry["state"] for entry in records.read(self._log)}
            was_running = [name for name in self._left if states.get(name) == BEGUN]
            reason = "took too long" if code is None else "failed, see above"
            states |= dict.fromkeys(was_running, reason)
            for name in self._left:
                if states.get(name, DONE) != DONE:
                    self._missing.append(f"{self._count} GPUs, {name}: {states[name]}")
            self._left = [name for name in self._left if name not in states]
            if not self._left:
                return self._missing
            # One that fails ends all processes; the others go on without it.
            if code in (0, None) or not was_running or time.time() + START > self._ends:
                ended = "not reached" if code in (0, None) else "not reached: a process failed"
                self._missing += [f"{self._count} GPUs, {name}: {ended}" for name in self._left]
                return self._missing
            self._process = self._started()


def differing(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Settings whose losses differ between numbers of GPUs by more than rounding."""
    found = []
    for name, group in by_setting(rows).items():
        losses = [row["loss"] for row in group]
        if max(losses) - min(losses) > ROUNDING * max(map(abs, losses)):
            found.append(f"{name}: losses {losses}")
    return found


def by_setting(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows that were measured on several numbers of GPUs, ascending by them."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["bench"] == "overlap":
            continue
        name = f"{row['bench']} {row['shape']} {row['tokens']} keep {row['keep']:g}"
        ctas = f" ctas {row['max_ctas']}" if row.get("max_ctas") else ""
        found.setdefault(f"{name} {row['recompute']}{ctas}", []).append(row)
    return {name: sorted(group, key=lambda row: row["gpus"]) for name, group in found.items()}


def efficiency(row: dict[str, Any], least: dict[str, Any]) -> float:
    """Work in a GPU second by that of the least number of GPUs that was measured."""
    if row["bench"] == "context":
        return least["gpus"] * least["step_s"] / (row["gpus"] * row["step_s"])
    return least["step_s"] / row["step_s"]


def report(rows: list[dict[str, Any]], missing: Sequence[str]) -> None:
    for name, group in by_setting(rows).items():
        for row in group:
            print(
                f"{name:<52} {row['gpus']} GPUs: {row['step_s']} s (computed "
                f"{row['predicted_s']}), {row['peak_gib']} GiB (computed {row['predicted_gib']}), "
                f"efficiency {efficiency(row, group[0]):.3f}, loss {row['loss']}, gradients' norm "
                f"{row['gradient_norm']}"
            )
    for line in differing(rows):
        print(f"DIFFERENT {line}")
    for line in missing:
        print(f"NOT MEASURED {line}")


# --- what is expected


def plan_of(setting: Setting, gpus: int, options: argparse.Namespace) -> Any:
    """The plan of a process: what its layers do, and the expected time and memory.

    Rates are nominal ones, so that all processes have the same plan.
    """
    import lemo
    from common.models import config_of_shape
    from lemo.planner.plan import NOMINAL
    from lemo.planner.request import Request
    from lemo.planner.shape import Adapters, shape_of

    tokens = setting.tokens // options.shorten
    shape = shape_of(config_of_shape(setting.shape, tokens, options.layers, options.shrink))
    request = Request(
        shape,
        Adapters(RANK, frozenset(TARGETS), size=2),
        lemo.LemoConfig(keep=setting.keep, head_groups=1).resolved(answers=False),
        NOMINAL,
        autocast=False,
        cuda=options.device == "cuda",
        processes=gpus if setting.bench == "context" else 1,
        shards=gpus if setting.bench == "fsdp" else 1,
    )
    planner = request.planner(tokens)
    if setting.recompute != "auto":
        return planner.of([setting.recompute] * shape.layers, 0)
    return planner.plan(round(memory_of(options) * GIB))


def memory_of(options: argparse.Namespace) -> float:
    """GiB that a plan may take."""
    if options.memory is not None:
        return options.memory
    if options.device == "cpu":
        return 8.0
    import torch

    # Of an H200 where the main process plans, which does not touch a GPU.
    if not torch.cuda.is_initialized():
        return 139.0 - RESERVED
    return torch.cuda.mem_get_info()[1] / GIB - RESERVED


def seconds_of(setting: Setting, gpus: int, options: argparse.Namespace) -> float:
    """Seconds that a setting takes with all that belongs to it."""
    if options.device == "cpu":
        return 5.0
    plan = plan_of(setting, gpus, options)
    if plan is None:
        return 0.1
    steps = min(STEPS, 1 + int(ENOUGH / plan.seconds)) + is_profiled(setting, gpus, options)
    return MAKING + 1.1 * steps * plan.seconds


# --- one process of a group


def work(settings: dict[str, Any]) -> None:
    """Measures settings one after the other, in a process of a group that torchrun started."""
    import torch
    import torch.distributed as dist

    import multi_gpu

    options = argparse.Namespace(**settings)
    device = multi_gpu.place(options.device)
    measure_all(options, device)
    if torch.distributed.is_initialized():
        dist.destroy_process_group()


def measure_all(options: argparse.Namespace, device: Any) -> None:
    """Every setting of `options.left`, where there is time for it; all processes call it."""
    import torch
    import torch.distributed as dist

    import multi_gpu

    gpus, main = dist.get_world_size(), dist.get_rank() == 0

    def note(name: str, state: str) -> None:
        if main:
            records.append(Path(options.log), [{"name": name, "state": state}])

    settings = wanted([], gpus, options.ctas)
    for setting in (each for each in settings if each.name in options.left):
        plan = plan_of(setting, gpus, options)
        if plan is None:
            note(setting.name, f"does not fit into {memory_of(options):g} GiB, as planned")
            continue
        # By one clock.
        late = torch.tensor(
            float(time.time() + seconds_of(setting, gpus, options) > options.ends), device=device
        )
        dist.broadcast(late, 0)
        if late.item():
            note(setting.name, "not reached")
            continue
        note(setting.name, BEGUN)
        row = measured(setting, plan, gpus, options, device)
        multi_gpu.free(device)
        if main:
            write(row, options)
        note(setting.name, DONE)


def measured(
    setting: Setting, plan: Any, gpus: int, options: argparse.Namespace, device: Any
) -> dict[str, Any]:
    """The row of a setting, without where and when."""
    import torch
    import torch.distributed as dist

    import lemo
    import multi_gpu
    from common import models
    from common.timing import summary

    tokens = setting.tokens // options.shorten
    config = models.config_of_shape(setting.shape, tokens, options.layers, options.shrink)
    model = models.with_lora(models.random_llama(config, str(device)), RANK, list(TARGETS)).train()
    elimination = lemo.LemoConfig(keep=setting.keep, recompute=plan.modes, head_groups=1)
    shares = setting.bench == "context" and gpus > 1
    # The mean of the gradients over the group is taken by DDP, as `lemo finetune` has it.
    context = lemo.ContextParallel(group_of(setting), False) if shares else None
    handle = lemo.enable(model, elimination, context)
    bench = None if gpus == 1 else "data" if shares else setting.bench
    wrapped = multi_gpu.in_all_processes(model, bench, device)
    trainable = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4)
    generator = torch.Generator().manual_seed(0 if shares else dist.get_rank())
    ids = torch.randint(config.vocab_size, (1, tokens), generator=generator).to(device)
    norms: list[float] = []

    def step(length: int, number: int, learn: bool = True) -> tuple[float, float]:
        """(seconds, loss) of a step."""
        multi_gpu.synchronize(device, True)
        handle.begin_step(number, 10**6)
        start = time.perf_counter()
        loss = wrapped(input_ids=ids[:, :length], labels=ids[:, :length]).loss
        loss.backward()
        if learn:
            optimizer.step()
        multi_gpu.synchronize(device, True)
        seconds = time.perf_counter() - start
        if setting.bench == "context":
            norms.append(norm_of(trainable))
        optimizer.zero_grad()
        return seconds, loss.item()

    # Weights stay as they are, so that the loss behind it is that of any number of GPUs.
    step(min(SHORT, tokens), 0, learn=False)
    norms.clear()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    losses: list[float] = []
    more = torch.ones((), device=device)
    while more.item():
        seconds, loss = step(tokens, len(times))
        times.append(seconds)
        losses.append(loss)
        more.fill_(len(times) < STEPS and sum(times) < ENOUGH)
        dist.broadcast(more, 0)
    peak = torch.cuda.max_memory_allocated() / GIB if on_gpu else 0.0
    counted = multi_gpu.Steps(times[1:] or times, peak, 0.0, losses[0])
    together = multi_gpu.highest(counted, device)
    taken = summary(together.seconds)
    row = {
        "bench": setting.bench,
        "shape": NAMES[setting.shape],
        "gpus": gpus,
        "tokens": tokens,
        "keep": setting.keep,
        "step_s": round(taken.median, 4),
        "range": taken.range,
        "one_gpu_s": None,
        "one_gpu_range": None,
        "peak_gib": round(together.peak_gib, 2) if on_gpu else None,
        "one_gpu_gib": None,
        "loss": round(losses[0], 5),
        "one_gpu_loss": None,
        "gradient_norm": norms[0] if norms else None,
        "layers": config.num_hidden_layers,
        "shrink": options.shrink,
        "recompute": setting.recompute,
        "modes": [[len(layers), mode] for layers, mode, _ in plan.runs()],
        "visible_keys": "kept",
        "reps": len(together.seconds),
        "predicted_s": round(plan.seconds, 3) if on_gpu else None,
        "predicted_gib": round(plan.peak / GIB, 2) if on_gpu else None,
        "max_ctas": setting.max_ctas,
        "beside": options.beside,
        "run": options.run,
    }
    if is_profiled(setting, gpus, options):
        row["overlap"] = profiled(lambda: step(tokens, len(times)), setting, gpus, options)
    return row


def group_of(setting: Setting) -> Any:
    """All processes; None: as they are."""
    import torch.distributed as dist

    if not setting.max_ctas:
        return None
    asked = dist.ProcessGroupNCCL.Options()
    asked.config.max_ctas = setting.max_ctas
    return dist.new_group(backend="nccl", pg_options=asked)


def norm_of(parameters: Sequence[Any]) -> float:
    """Of the gradients of whole tensors."""
    import torch

    return torch.nn.utils.get_total_norm([p.grad for p in parameters]).item()


def profiled(
    step: Any, setting: Setting, gpus: int, options: argparse.Namespace
) -> dict[str, Any] | None:
    """What a step of the first process overlaps; the others only take it."""
    import torch.distributed as dist
    from torch.profiler import ProfilerActivity, profile

    from common import traces

    if dist.get_rank():
        step()
        return None
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(options.traces or folder) / f"{gpus} {setting.name}.json".replace(" ", "-")
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        return traces.overlap_of_trace(path)


def write(row: dict[str, Any], options: argparse.Namespace) -> None:
    """Appends the row, beside that of one GPU of this call, if that was measured before."""
    path, overlapping = Path(options.output), row.pop("overlap", None)
    key = ("bench", "shape", "tokens", "keep", "recompute", "run")
    for other in records.read(path, row["bench"]):
        if other.get("gpus") == 1 and all(other.get(name) == row[name] for name in key):
            row |= {"one_gpu_s": other["step_s"], "one_gpu_range": other["range"]}
            row |= {"one_gpu_gib": other["peak_gib"], "one_gpu_loss": other["loss"]}
    provenance = records.provenance(options.commit, options.device)
    rows = [row | provenance]
    if overlapping is not None:
        names = ("shape", "gpus", "tokens", "keep", "recompute", "max_ctas", "run", "step_s")
        shown = {name: row[name] for name in names}
        rows.append({"bench": "overlap", "of": row["bench"], **shown, **overlapping} | provenance)
    records.append(path, rows)
    for each in rows:
        print(json.dumps(each), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        work(json.loads(sys.argv[2]))
    else:
        sys.exit(main())
