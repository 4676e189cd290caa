"""The error boundary: every failure is one line on standard error and an exit code."""

import errno
import signal
import subprocess
import sys
import textwrap

import pytest

import lemo
from lemo.cli import main as module
from lemo.cli.main import describe_error, main

# The command line.
pytestmark = pytest.mark.cpu_only


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        main(list(arguments))
    captured = capsys.readouterr()
    return exit_.value.code, captured.out, captured.err


def test_help_names_the_commands(capsys):
    for arguments in ([], ["--help"], ["-h"], ["--debug"]):
        code, out, err = run(capsys, *arguments)
        assert (code, err) == (0, "")
        for command in ("prepare", "finetune", "eval", "report", "demo"):
            assert f"  {command}" in out


@pytest.mark.parametrize("group", [[], ["data"], ["relevance"]])
def test_help_of_a_group_has_a_line_for_each_command(capsys, monkeypatch, group):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run(capsys, *group)
    assert (code, err) == (0, "")
    # A summary that is too long for its line ends in dots.
    assert "\nCommands:\n" in out
    assert "..." not in out.partition("Commands:")[2]
    assert run(capsys, *group, "--help") == (0, out, "")


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"lemo {lemo.__version__}\n", "")


def test_help_does_not_load_torch():
    script = """
        import sys
        from lemo.cli.main import main
        try:
            main(["finetune", "--help"])
        finally:
            assert not {"torch", "transformers"} & set(sys.modules), "slow"
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetuna"], "No such command 'finetuna'"),
        (["finetune", "--stepz", "3"], "No such option: --stepz"),
        (["finetune", "--steps", "many"], "Invalid value for '--steps'"),
        (["finetune", "--steps", "many"], "got 'many'"),
        (["finetune", "--keep", "25%"], "got '25%'"),
        (["eval", "--lengths", "64"], "Missing option '--documents'"),
    ],
)
def test_wrong_usage(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("lemo: error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("keep: expected\n  a share"), "keep: expected a share"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x.txt"), "No such file: x.txt"),
        (FileNotFoundError("model: nothing at 'x'"), "model: nothing at 'x'"),
        (MemoryError(), "out of memory"),
        (RuntimeError("can't allocate memory: 9"), "out of memory: can't allocate memory: 9"),
        (FloatingPointError("step 2: the loss is nan"), "step 2: the loss is nan"),
        (
            ImportError("lemo's ops are missing: 'make develop'"),
            "lemo's ops are missing: 'make develop'",
        ),
        (KeyError("x"), "internal error, --debug shows where: KeyError: 'x'"),
        (ValueError(), "ValueError"),
    ],
)
def test_one_line_for_an_error(error, line):
    assert describe_error(error) == line


def test_debug_shows_the_traceback_wherever_it_stands(capsys):
    for arguments in (["--debug", "report", "none"], ["report", "none", "--debug"]):
        code, _, err = run(capsys, *arguments)
        assert code == 1
        assert "Traceback" in err
        assert err.splitlines()[-1].startswith("lemo: error: ")
    assert "Traceback" not in run(capsys, "report", "none")[2]


def test_interrupt(capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "app", interrupted)
    assert run(capsys, "report") == (130, "", "lemo: interrupted\n")


def test_an_interrupt_of_which_a_library_makes_another_error(capsys, monkeypatch):
    def imported(*_, **__):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as interrupt:
            raise ModuleNotFoundError("Could not import module 'Other'") from interrupt

    monkeypatch.setattr(module, "app", imported)
    assert run(capsys, "report") == (130, "", "lemo: interrupted\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_interrupt_stays_ignored(capsys, monkeypatch):
    monkeypatch.setattr(module, "app", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run(capsys, "report") == (0, "", "")
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_while_the_command_line_is_imported():
    script = """
        import signal, sys
        class Interrupted:
            def find_spec(self, name, path=None, target=None):
                if name == "lemo.cli.finetune":
                    signal.raise_signal(signal.SIGINT)
        sys.meta_path.insert(0, Interrupted())
        from lemo.__main__ import main
        main()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "lemo: interrupted\n")
