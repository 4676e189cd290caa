"""Measurements in processes of their own, so that one cannot disturb or end another.

A script hands its `main` and its `worker` to `run_script`. Its main process starts workers, which
are the same script again, and talks to them in lines of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

__all__ = [
    "MEASURE",
    "Worker",
    "WorkerError",
    "last_object",
    "measure",
    "measure_all",
    "run_script",
]

WORKER = "--worker"
MEASURE = "measure"


class WorkerError(RuntimeError):
    """A worker ended without an answer."""


class Worker:
    """The script `script` in a process of its own.

    Args:
        script: file of a script that calls `run_script`.
        settings: what its worker gets, fit for JSON.
        environment: variables over those of this process.
        log: file for all that it prints; None: the standard error of this process.
    """

    def __init__(
        self,
        script: str,
        settings: Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        self._log = None if log is None else log.open("w", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, script, WORKER, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **(environment or {})},
        )

    def ask(self, question: str, seconds: float | None = None) -> dict[str, Any]:
        """The worker's answer.

        Args:
            seconds: the process is ended where it answers later; None: it may take any time.

        Raises:
            WorkerError: the process ended instead, by itself or because it took too long.
        """
        late = threading.Event()

        def end() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(seconds or 0.0, end)
        if seconds is not None:
            timer.start()
        try:
            self._process.stdin.write(question + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            code = self._process.wait()
            raise WorkerError(
                f"no answer in {seconds:g} s" if late.is_set() else f"exit code {code}"
            )
        return json.loads(line)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        # Nobody waits for an answer any more.
        if kind is not None:
            self.end()
        else:
            self.close()

    def end(self) -> None:
        """Ends the process now, whatever it does."""
        self._process.kill()
        self.close()

    def close(self) -> None:
        """Lets the process end, and waits for it."""
        self._process.stdout.close()
        # It may have ended with a question on its way.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        if self._log is not None:
            self._log.close()


def run_script(
    main: Callable[[], int | None],
    worker: Callable[[dict[str, Any]], Callable[[str], dict[str, Any]]],
) -> None:
    """Runs a script: its `main`, or in a process that `Worker` started, its `worker`.

    Args:
        main: the whole benchmark; returns the exit code, None for 0.
        worker: takes a worker's settings, and returns the function that answers questions.
    """
    if sys.argv[1:2] != [WORKER]:
        sys.exit(main())
    # Standard output is for answers only; what libraries print there goes to standard error.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        answer = worker(json.loads(sys.argv[2]))
        for question in sys.stdin:
            answers.write(json.dumps(answer(question.strip())) + "\n")
            answers.flush()


def measure(
    script: str,
    settings: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
    log: Path | None = None,
) -> dict[str, Any] | None:
    """What a new worker answers to MEASURE; None where it failed, which is printed."""
    try:
        with Worker(script, settings, environment, log) as worker:
            return worker.ask(MEASURE)
    except WorkerError as error:
        print(f"{settings.get('name', script)}: {error}{f'; {log}' if log else ''}", flush=True)
        return None


def measure_all(
    script: str,
    jobs: Iterable[tuple[Mapping[str, Any], Path | None]],
    places: Sequence[Mapping[str, str]],
) -> Iterator[dict[str, Any] | None]:
    """Answers to MEASURE in the order of the jobs, as many at a time as there are places.

    Args:
        script: as for `Worker`.
        jobs: settings and log file of each worker.
        places: the environment of each place: which GPU, how many threads.
    """
    free: queue.SimpleQueue[Mapping[str, str]] = queue.SimpleQueue()
    for place in places:
        free.put(place)

    def run(job: tuple[Mapping[str, Any], Path | None]) -> dict[str, Any] | None:
        place = free.get()
        try:
            return measure(script, job[0], place, job[1])
        finally:
            free.put(place)

    with ThreadPoolExecutor(len(places)) as pool:
        yield from pool.map(run, list(jobs))


def last_object(command: Sequence[object]) -> dict[str, Any] | None:
    """The last JSON object that a command prints; None where it failed."""
    done = subprocess.run(
        [str(word) for word in command], stdout=subprocess.PIPE, text=True, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if done.returncode == 0 and lines else None
