"""Kills one of two processes of `lemo finetune` with SIGKILL, and checks what becomes of the run.

    python scripts/lost_process.py --model FOLDER --documents FILE [--device cuda] [--patience 30]

Two runs at the same time:

    launched   by torchrun. Expected: torchrun ends with an error within --within seconds, and no
               process is left; the same command with --resume goes on from the last checkpoint and
               ends the run: every step once, all losses finite.
    alone      the two processes are started without a launcher, as on two hosts, and their process
               group waits --patience seconds for a lost one. Expected: the other process ends by
               itself within --patience and --within seconds, with lemo's own error.

Prints a line for each check, what the processes printed last, and in the end a verdict; exits with
1 where a check fails.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

SAVE_EVERY, KILLED_BEHIND = 10, 20
checks: list[bool] = []


def check(holds: bool, what: str) -> None:
    checks.append(holds)
    print(f"{'ok    ' if holds else 'FAILED'} {what}", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--documents", required=True)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--patience", type=float, default=30.0, help="of a process group, seconds")
    parser.add_argument("--within", type=float, default=60.0, help="seconds for an end")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--start", type=float, default=180.0, help="seconds for a run to get going")
    parser.add_argument("--member", help=argparse.SUPPRESS)  # the folder of a run
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    if options.member:
        member(options)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = Launched(options, folder / "launched"), Alone(options, folder / "alone")
        with ThreadPoolExecutor(len(runs)) as pool:
            list(pool.map(lambda run: run.check(), runs))
    print(
        f"VERDICT: {'passed' if all(checks) else 'FAILED'}, {sum(checks)} of {len(checks)} checks"
    )
    return 0 if all(checks) else 1


def settings(options: argparse.Namespace, folder: Path) -> dict:
    return {
        "model": options.model,
        "documents": options.documents,
        "output": str(folder),
        "context_length": options.tokens,
        "steps": options.steps,
        "save_every": SAVE_EVERY,
        "device": options.device,
    }


def member(options: argparse.Namespace) -> None:
    """A process of a run without a launcher."""
    import torch
    import torch.distributed as dist

    from lemo.settings.finetune import FinetuneConfig
    from lemo.training.finetune import finetune

    patience = timedelta(seconds=options.patience)
    if options.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=patience, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=patience)
    finetune(FinetuneConfig.from_dict(settings(options, Path(options.member))))


class Launched:
    """A run that torchrun starts."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options, self._folder = options, folder
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", "2", "-m", "lemo", "finetune"]
        given = settings(options, folder)
        given["context-length"] = given.pop("context_length")
        given["save-every"] = given.pop("save_every")
        for key, value in given.items():
            command += [f"--{key}", str(value)]
        self._command, self._log = command, folder.with_suffix(".log")
        self._process = self._started([])

    def _started(self, more: list[str]) -> subprocess.Popen[bytes]:
        with self._log.open("wb") as log:
            return subprocess.Popen(self._command + more, stdout=log, stderr=log)

    def check(self) -> None:
        self._lose_one()
        self._check_end()
        self._resume()

    def _lose_one(self) -> None:
        wait_for_checkpoint(self._folder, self._process, self._options)
        self._workers = children(self._process.pid)
        if len(self._workers) == 2:
            os.kill(self._workers[1], signal.SIGKILL)
        self._killed = time.time()

    def _check_end(self) -> None:
        check(len(self._workers) == 2, f"launched: two workers ran: {self._workers}")
        code = ended(self._process, self._killed + self._options.within)
        seconds = time.time() - self._killed
        check(code not in (None, 0), f"launched: torchrun ended with {code} in {seconds:.1f} s")
        time.sleep(1)
        left = [pid for pid in self._workers if is_running(pid)]
        check(not left, f"launched: no process is left: {left}")
        print(tail(self._log))
        steps = [entry["step"] for entry in log_of(self._folder)]
        check(
            KILLED_BEHIND <= max(steps) < self._options.steps,
            f"launched: it was at step {max(steps)}",
        )

    def _resume(self) -> None:
        begun = time.time()
        code = ended(self._started(["--resume"]), begun + self._options.start)
        check(code == 0, f"launched: the resumed run ended with {code}")
        if code != 0:
            print(tail(self._log))
        entries = log_of(self._folder)
        steps = [entry["step"] for entry in entries]
        check(
            steps == [*range(1, self._options.steps + 1)],
            f"launched: every step once ({len(steps)})",
        )
        losses = [entry["loss"] for entry in entries]
        shown = f"{losses[0]:.3f} to {losses[-1]:.3f}"
        check(all(map(math.isfinite, losses)), f"launched: finite losses, from {shown}")
        adapter = self._folder / "adapter" / "adapter_model.safetensors"
        check(adapter.is_file(), "launched: the adapter is there")


class Alone:
    """A run of two processes that nobody watches."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options, self._folder, self._log = options, folder, folder.with_suffix(".log")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        command = [sys.executable, *sys.argv, "--member", str(folder)]
        self._processes = []
        for rank in ("0", "1"):
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
            with self._log.with_suffix(f".{rank}").open("wb") as log:
                environment = {**os.environ, **ranks, **meeting}
                process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            self._processes.append(process)

    def check(self) -> None:
        wait_for_checkpoint(self._folder, self._processes[0], self._options)
        self._processes[1].kill()
        killed = time.time()
        code = ended(self._processes[0], killed + self._options.patience + self._options.within)
        seconds = time.time() - killed
        check(code not in (None, 0), f"alone: the other ended with {code} after {seconds:.1f} s")
        log = self._log.with_suffix(".0")
        text = log.read_text(errors="replace")
        named = "another process of the run is gone" in text
        check(named, "alone: lemo's own error was printed")
        print(tail(log))
        # The last checkpoint is whole: the files can be read.
        states = sorted((self._folder / "checkpoints").glob("*"))
        check(bool(states), f"alone: checkpoints are there: {[each.name for each in states]}")


def wait_for_checkpoint(
    folder: Path, process: subprocess.Popen[bytes], options: argparse.Namespace
) -> None:
    """Waits until a step behind the one of KILLED_BEHIND is logged."""
    ends = time.time() + options.start
    while time.time() < ends and process.poll() is None:
        if any(entry["step"] > KILLED_BEHIND for entry in log_of(folder)):
            return
        time.sleep(0.02)
    check(False, f"{folder.name}: step {KILLED_BEHIND} came in {options.start:.0f} s")


def log_of(folder: Path) -> list[dict]:
    path, entries = folder / "log.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue  # being written
    return [entry for entry in entries if "loss" in entry]


def children(pid: int) -> list[int]:
    """Processes that a process started, by Linux's list."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ended(process: subprocess.Popen[bytes], until: float) -> int | None:
    """The exit code; None where it had to be ended."""
    try:
        return process.wait(max(until - time.time(), 0.1))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def tail(path: Path, lines: int = 25) -> str:
    text = path.read_text(errors="replace").splitlines()[-lines:]
    return "\n".join(f"       | {line[:300]}" for line in text)


if __name__ == "__main__":
    sys.exit(main())
