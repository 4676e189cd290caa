"""Writing, locking and removing files: links, devices, other processes, and what is not lemo's."""

import ast
import errno
import fcntl
import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

from lemo import files
from lemo.files import (
    json_text,
    lock,
    new_folder,
    put_folder,
    remove_folder,
    restore_folder,
    updating,
    write_file,
)
from lemo.planner.shape import ModelShape
from lemo.planner.timing import Rates
from lemo.training import calibration
from lemo.training.metrics import add_metrics, read_metrics
from source_tree import ROOT

# The file system.
pytestmark = pytest.mark.cpu_only

OWN = re.compile(r"a\.txt|b\.txt")


@pytest.mark.parametrize("folder", ["absent", "file"])
def test_a_file_that_cannot_be_written_is_named_itself(tmp_path, folder):
    (tmp_path / "file").touch()
    path = tmp_path / folder / "a.txt"
    with pytest.raises(OSError) as caught:  # noqa: PT011
        write_file(path, "content")
    assert (caught.value.filename, caught.value.filename2) == (str(path), None)


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far" / "target", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to("far/target")
    write_file(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_a_pipe_gets_the_content(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_file(pipe, "content")
    reader.join()
    assert read == [b"content"]
    assert pipe.is_fifo()


def test_a_device_stays_one():
    before = Path("/dev/null").stat().st_rdev
    write_file(Path("/dev/null"), "content")
    assert Path("/dev/null").stat().st_rdev == before != 0
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        write_file(Path("/dev/full"), "content")


def test_standard_output_in_a_file_goes_on_where_it_is(tmp_path):
    """Neither a new file in its place nor one that begins again: both lose what was printed."""
    script = (
        "from lemo.files import write_file; from pathlib import Path; print('first', flush=True);"
        "write_file(Path('/dev/stdout'), 'second\\n'); print('third', flush=True)"
    )
    output = tmp_path / "output"
    with output.open("wb") as file:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", script]
        subprocess.run(command, stdout=file, check=True, env=environment)
    assert output.read_text() == "first\nsecond\nthird\n"


def test_names_as_long_as_the_system_takes(tmp_path):
    path = tmp_path / ("ü" * 127)
    write_file(path, "content")
    assert [entry.read_text() for entry in tmp_path.iterdir()] == ["content"]


def test_a_temporary_link_of_that_name_leads_nobody_astray(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".a.txt.tmp").symlink_to(victim)
    write_file(tmp_path / "a.txt", "content")
    assert victim.read_text() == "precious"


def test_a_folder_that_is_replaced_keeps_what_only_it_has(tmp_path):
    for name, content in (("a.txt", "old"), ("notes", "mine")):
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / name).write_text(content)
    with new_folder(tmp_path / "folder") as folder:
        (folder / "a.txt").write_text("new")
    assert (tmp_path / "folder" / "a.txt").read_text() == "new"
    assert (tmp_path / "folder" / "notes").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def _replaced(tmp_path, end) -> Path:
    """An old folder in whose place a new one was being put when ``end`` was called."""
    place, new = tmp_path / "folder", tmp_path / "new"
    for folder in (place, new):
        folder.mkdir()
        (folder / "a.txt").write_text(folder.name)
    child = os.fork()
    if not child:
        move = os.replace

        def first_move(*paths):
            move(*paths)
            end()

        files.os.replace = first_move
        try:
            put_folder(new, place)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return place


def test_a_kill_between_two_moves_loses_nothing(tmp_path):
    place = _replaced(tmp_path, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert not place.exists()
    restore_folder(place)
    assert (place / "a.txt").read_text() == "folder"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "new"]


def test_an_interrupt_between_two_moves_puts_the_old_folder_back(tmp_path):
    place = _replaced(tmp_path, lambda: signal.raise_signal(signal.SIGINT))
    assert (place / "a.txt").read_text() == "folder"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "new"]


def test_only_own_files_are_removed(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("")
    (folder / ".b.txt.0123abcd.tmp").write_text("")
    for stranger in ("c.txt", "b.txt"):
        if stranger == "b.txt":
            (folder / stranger).symlink_to(tmp_path)
        else:
            (folder / stranger).write_text("")
        with pytest.raises(FileExistsError, match=f"{stranger}' was not written by lemo"):
            remove_folder(folder, OWN)
        assert (folder / "a.txt").exists()
        (folder / stranger).unlink()
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(FileExistsError, match="link' was not written by lemo"):
        remove_folder(tmp_path / "link", OWN)
    remove_folder(folder, OWN)
    assert not folder.exists()


def test_a_lock_keeps_others_out_and_leaves_nothing(tmp_path):
    file = tmp_path / "deep" / "folder" / ".lock"
    with lock(file, "output: 'x'"):
        with (
            pytest.raises(BlockingIOError, match=f"output: 'x' is in use by process {os.getpid()}"),
            lock(file, "output: 'x'"),
        ):
            pass
        with pytest.raises(BlockingIOError), lock(file, "x", shared=True):
            pass
    assert list(tmp_path.iterdir()) == []
    with lock(file, "x", shared=True):
        with lock(file, "x", shared=True), pytest.raises(BlockingIOError), lock(file, "x"):
            pass
        assert file.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_vanishes_with_its_process(tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from lemo.files import lock\n"
        "with lock(Path(sys.argv[1]), 'x'): os.kill(os.getpid(), 9)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(tmp_path / ".lock")]
    assert subprocess.run(command, env=environment).returncode == -9
    assert (tmp_path / ".lock").exists()
    with lock(tmp_path / ".lock", "x"):
        assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, caplog):
    def no_locks(descriptor, kind):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    with lock(tmp_path / ".lock", "output: 'x'"):
        pass
    assert "output: 'x': its file system has no locks (No locks available)" in caplog.text


def test_a_full_disk_still_locks(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "pwrite", full)
    with lock(tmp_path / ".lock", "x"), (tmp_path / ".lock").open("w") as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with (
            pytest.raises(BlockingIOError, match="x is in use by another process"),
            lock(tmp_path / ".lock", "x"),
        ):
            pass


def test_json_is_whole_when_two_write_it(tmp_path):
    path, content = tmp_path / "r.json", json.dumps(list(range(20_000)))
    threads = [
        threading.Thread(target=lambda: [write_file(path, content) for _ in range(10)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert json.loads(path.read_text()) == list(range(20_000))
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.json"]


def rows_of_evaluations(folder, monkeypatch):
    """Adds a row to the metrics of a run, and all rows that it has."""
    path = folder / "metrics.json"

    def add(number):
        add_metrics(path, [{"source": f"{number}", "kind": "text", "length": 8}])

    return add, lambda: {row["source"] for row in read_metrics(path)}


def rates_of_models(folder, monkeypatch):
    """Measures a model's rates, and all models whose rates are stored."""
    device = torch.device("cpu")
    monkeypatch.setattr(calibration, "FOLDER", folder)
    monkeypatch.setattr(calibration, "measure", lambda *_: Rates(1, 1, 1, 1, 1))

    def shape(number):
        return ModelShape(1, 8 * number, 16, 1, 1, 8, 32)

    def stored():
        rates = calibration.stored_rates
        return {f"{n}" for n in range(20) if rates(shape(n), device, torch.float32) is not None}

    return lambda number: calibration.calibrated(shape(number), device, torch.float32), stored


@pytest.mark.parametrize("blocked", ["folder", "no home"])
def test_rates_that_cannot_be_stored_are_used(tmp_path, monkeypatch, caplog, blocked):
    measure, stored = rates_of_models(tmp_path, monkeypatch)
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "lemo" if blocked == "folder" else Path("~", ".cache", "lemo")
    monkeypatch.setattr(calibration, "FOLDER", folder)
    monkeypatch.chdir(tmp_path)
    assert measure(1) == Rates(1, 1, 1, 1, 1)
    assert stored() == set()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    [message] = caplog.messages
    assert message.startswith(f"the rates of this machine are not stored in '{folder}': ")


def test_a_user_without_a_home_folder():
    script = """
        import os, pwd
        os.environ.pop("HOME", None)
        def absent(number):
            raise KeyError(number)
        pwd.getpwuid = absent
        from lemo.training import calibration
        assert not calibration.FOLDER.is_absolute()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


@pytest.mark.parametrize("kind", [rows_of_evaluations, rates_of_models])
def test_what_several_add_at_the_same_time_all_stays(tmp_path, monkeypatch, kind):
    add, stored = kind(tmp_path, monkeypatch)
    threads = [
        threading.Thread(target=lambda first: [add(n) for n in range(first, 20, 4)], args=(first,))
        for first in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stored() == {f"{n}" for n in range(20)}
    assert len(list(tmp_path.iterdir())) == 1


def test_an_update_waits_for_another_process(tmp_path):
    script = """
        import sys
        from pathlib import Path
        from lemo.files import updating
        with updating(Path(sys.argv[1])):
            print("ready", flush=True)
            sys.stdin.read()
    """
    path, order = tmp_path / "file", []
    (tmp_path / "link").symlink_to(path)

    def update():
        with updating(tmp_path / "link"):
            order.append("updated")

    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        process.stdout.readline()
        waiting = threading.Thread(target=update)
        waiting.start()
        waiting.join(0.2)
        order.append("given back")
        process.stdin.close()
        waiting.join()
    assert order == ["given back", "updated"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["link"]


def test_numbers_that_json_does_not_know_are_null():
    def refuse(name):
        raise AssertionError(name)

    value = {"a": [math.inf, -math.inf, (math.nan, 1.5)], "b": {"c": math.inf, "d": 7}, "e": "nan"}
    text = json_text(value, indent=2)
    assert text.endswith("}\n")
    assert json.loads(text, parse_constant=refuse) == {
        "a": [None, None, [None, 1.5]],
        "b": {"c": None, "d": 7},
        "e": "nan",
    }


def test_files_get_json_of_finite_numbers_alone():
    """Nobody writes what `json.dumps` makes of infinity; predictors' folders refuse it."""
    for path in sorted((ROOT / "python" / "lemo").rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and "write_file" in ast.unparse(call.func):
                assert "json.dumps" not in ast.unparse(call), f"{path}:{call.lineno}"
