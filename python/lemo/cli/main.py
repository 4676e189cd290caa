"""The ``lemo`` command and its one error boundary."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from types import FrameType

import typer
from pydantic import ValidationError

from lemo import __version__
from lemo.cli import data, demo, finetune, options, prepare, relevance, report
from lemo.cli import eval as eval_module
from lemo.cli import plan as plan_module
from lemo.cli.streams import TolerantStream, printable, tolerant_streams
from lemo.memory_errors import is_out_of_memory

# Errors that a user can cause; anything else is a defect of lemo and is called so. ImportError:
# something is not installed, such as lemo's compiled ops, and the message says what.
_EXPECTED = (
    ValueError,
    TypeError,
    OSError,
    ImportError,
    NotImplementedError,
    FloatingPointError,
)

app = typer.Typer(
    name="lemo",
    help="Fine-tune language models on long sequences; each step leaves out blocks of tokens.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for _command in (
    prepare.prepare,
    finetune.finetune,
    plan_module.plan,
    eval_module.eval,
    report.report,
    demo.demo,
):
    app.command()(_command)
app.add_typer(data.app, name="data")
app.add_typer(relevance.app, name="relevance")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lemo {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", help="Print the version.", is_eager=True, callback=_print_version
    ),
    debug: bool = typer.Option(
        False, "--debug", help="Show the traceback of an error (anywhere on the command line)."
    ),
) -> None:
    # main() takes --debug off the command line itself, so that it may stand after the command, too.
    # --version is done by its callback.
    del debug, version
    options.show_help(context)


def describe_error(error: BaseException) -> str:
    """One line that says what went wrong, without the type of an error that the user caused."""
    if hasattr(error, "format_message"):
        text = error.format_message()
        if isinstance(error.__cause__, ValidationError):  # Typer does not say what came.
            text += f", got {error.__cause__.errors()[0]['input']!r}"
    elif isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    elif is_out_of_memory(error):
        text = f"out of memory: {error}" if str(error) else "out of memory"
    elif isinstance(error, _EXPECTED):
        text = str(error)
    else:
        text = f"internal error, --debug shows where: {type(error).__name__}: {error}"
    return printable(" ".join(text.split())) or type(error).__name__


@contextlib.contextmanager
def _quiet_threads(debug: bool) -> Iterator[None]:
    """Keep tracebacks of OSErrors in threads off the screen.

    TensorBoard writes in a thread of its own; the main thread gets its error, too, and reports it.
    """
    show = threading.excepthook

    def report(failure: threading.ExceptHookArgs) -> None:
        if debug or not isinstance(failure.exc_value, OSError):
            show(failure)

    threading.excepthook = report
    try:
        yield
    finally:
        threading.excepthook = show


@contextlib.contextmanager
def _noted_interrupts() -> Iterator[list[int]]:
    """A list that is empty until an interrupt comes.

    KeyboardInterrupt is raised as always, but libraries make errors of their own of it: PyTorch a
    RuntimeError, of which Transformers makes a ModuleNotFoundError.
    """
    noted: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        noted.append(number)
        signal.default_int_handler(number, frame)

    # Whoever ignores interrupts, or calls from another thread, keeps it so.
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield noted
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted.

    A standard stream that is closed or full does not end the work. Results that could not be
    printed are a failure at its end, progress is not.

    Args:
        arguments: the command line without the program's name; None takes it from the process.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    # PEFT imports bitsandbytes, which on some CPUs recommends another package, whatever is done.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    with tolerant_streams() as (out, err):
        code = _run(arguments)
        code = _lost(out, err) or code
    sys.exit(code)


def _expanded(argument: str) -> str:
    """An argument with the home folder in the place of "~"; shells leave it in --option=~/name."""
    option, equals, value = argument.partition("=")
    if option.startswith("--") and equals:
        return f"{option}={os.path.expanduser(value)}"
    return os.path.expanduser(argument)


def _run(arguments: list[str]) -> int:
    debug = "--debug" in arguments
    with _quiet_threads(debug), _noted_interrupts() as interrupts:
        try:
            code = app(
                [_expanded(a) for a in arguments if a != "--debug"], "lemo", standalone_mode=False
            )
        except KeyboardInterrupt:
            code = 130
        except Exception as error:
            if debug:
                traceback.print_exc()
            if interrupts:
                code = 130
            else:
                print(f"lemo: error: {describe_error(error)}", file=sys.stderr)
                code = getattr(error, "exit_code", 1)
    if code == 130:
        print("lemo: interrupted", file=sys.stderr)
    return code if isinstance(code, int) else 0


def _lost(out: TolerantStream, err: TolerantStream) -> int:
    """Say what could not be written; 1 where that were results, otherwise 0."""
    out.flush()
    err.flush()
    if err.error is not None:
        message = f"lemo: warning: standard error: {_reason(err)}; some messages are lost"
        # It may work again; results that go into a file or a pipe are not mixed with it.
        print(message, file=out if out.isatty() else err)
    if out.error is not None:
        print(
            f"lemo: error: standard output: {_reason(out)}; not all results were printed", file=err
        )
    return int(out.error is not None)


def _reason(stream: TolerantStream) -> str:
    return getattr(stream.error, "strerror", None) or str(stream.error)
