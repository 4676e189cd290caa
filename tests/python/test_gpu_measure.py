"""Measurements on a GPU machine without a network: the table of parts, packing, placing."""

import io
import json
import lzma
import os
import re
import shutil
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

import gpu_carry
import gpu_measure
from gpu_measure import Part, Places

pytestmark = pytest.mark.cpu_only

PARTS, TEXTS = gpu_measure.read_parts()
WHERE = dict.fromkeys(("out", "work", "model", "small", "train", "eval"), "/a place")


def commands_of(name, gpus=(0,)):
    return gpu_measure.commands(PARTS[name], TEXTS, WHERE, "abc", gpus)


# The table


@pytest.mark.parametrize("name", PARTS)
def test_scripts_of_parts_have_the_options_that_they_are_given(name):
    for command in commands_of(name):
        if "pytest" in command:
            assert Path(gpu_measure.REPOSITORY, command[-1]).exists()
            continue
        if command[:2] == ["-m", "lemo"] or command[0].startswith("build/"):
            continue
        if not gpu_measure.interpreter(command):
            assert os.access(Path(gpu_measure.REPOSITORY, command[0]), os.X_OK)
            continue
        script = next(word for word in command if word.endswith(".py"))
        source = Path(gpu_measure.REPOSITORY, script).read_text()
        if not script.startswith("scripts"):
            source += Path(gpu_measure.REPOSITORY, "benchmarks/common/records.py").read_text()
        given = [w for w in command[command.index(script) :] if re.match(r"--[a-z]", w)]
        for option in given:
            # records.add_documents makes three options of a list of names.
            assert f'"{option}"' in source or option in ("--model", "--train", "--eval"), option


def test_what_parts_need_can_be_packed():
    for part in PARTS.values():
        assert set(part.bundles) <= gpu_carry.WHEELS.keys()
        inputs = {"{model}": {"model"}, "{small}": {"small"}}
        inputs |= {place: {"data", "documents"} for place in ("{train}", "{eval}")}
        text = " ".join(part.run)
        for beginning, whole in TEXTS.items():
            text = text.replace(f"{{{beginning}}}", whole)
        for place, needed in inputs.items():
            assert place not in text or needed & set(part.needs), part.name
    assert set(gpu_carry.WHEELS) | {"session", "data", "small", "model"} == set(gpu_carry.ORDER)


def test_rows_go_where_rows_of_that_kind_are():
    known = {path.name for path in gpu_measure.REPOSITORY.glob("benchmarks/results/*.jsonl")}
    assert {part.rows for part in PARTS.values() if part.rows} <= known


def test_commands():
    (command,) = commands_of("quality-groups", [1])
    assert command[:3] == ["benchmarks/quality.py", "--gpus", "1"]
    assert command[command.index("--train") + 1] == "/a place", "one word"
    assert command[-4:] == ["--output", "/a place/quality.jsonl", "--commit", "abc"]
    assert "131072 keep 0.5 layer" in commands_of("scaling", [0, 1])[0]
    assert "--output" not in commands_of("suite")[0]
    trained, answered = commands_of("answers-long-predictor")
    assert trained[trained.index("--output") + 1] == "/a place/relevance_predictor.jsonl"
    assert answered[answered.index("--output") + 1] == "/a place/answers.jsonl"


def test_a_dry_run_prints_commands_and_begins_none(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(gpu_measure, "DONE", tmp_path / "done")
    monkeypatch.setattr(gpu_measure, "WORK", tmp_path / "build" / "work")
    assert gpu_measure.main(["run", "scaling", "fa4", "--dry-run", "--gpus", "2", "3"]) == 0
    text = capsys.readouterr().out
    assert "CUDA_VISIBLE_DEVICES=2,3" in text
    assert "CUDA_VISIBLE_DEVICES=2 " in text
    assert f"--output {tmp_path}/out/comparison.jsonl" in text
    assert not (tmp_path / "out").exists()


def test_the_table_names_every_part(capsys):
    assert gpu_measure.main(["parts"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(PARTS)


def test_wrong_options_are_named(capsys):
    for arguments, message in (
        (["run", "unknown"], "unknown"),
        (["run", "fp8", "--model", "/no/such/place"], "expected a path that exists"),
        (["pack", "--first", "0"], "expected 1 MiB or more, got 0"),
    ):
        with pytest.raises(SystemExit):
            gpu_measure.main(arguments)
        assert message in capsys.readouterr().err


# Running


def part(name, gpus=1.0, host=0, seconds=20, command="-c pass"):
    return Part(name, name, seconds, gpus, (command,), host=host)


def test_places():
    room = Places([0, 1], host=100)
    half, one, two = part("half", 0.5), part("one", host=60), part("two", 2)
    assert room.take(two) == [0, 1]
    assert room.fitting(half) == []
    room.release(two, [0, 1])
    assert room.take(half) == [0]
    assert room.take(half) == [0], "two share a GPU before another one is taken"
    assert room.take(one) == [1]
    assert room.fitting(part("none", 0.5)) == []
    room.release(half, [0])
    assert room.fitting(half) == [0]
    assert room.fitting(part("large", 0.5, host=50)) == [], "the host's memory is taken"
    room.release(one, [1])
    assert room.fitting(part("large", 0.5, host=50)) == [0]
    assert room.fitting(two) == []
    taken = []
    waiting = threading.Thread(target=lambda: taken.append(room.take(two)))
    waiting.start()
    room.release(half, [0])
    waiting.join(10)
    assert taken == [[0, 1]]


@pytest.fixture
def running(monkeypatch, tmp_path):
    """Runs stand-ins of parts; returns the exit code."""
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(gpu_measure, "DONE", tmp_path / "done")

    def run(parts, *options):
        table = {x.name: x for x in parts}
        monkeypatch.setattr(gpu_measure, "read_parts", lambda: (table, {}))
        return gpu_measure.main(["run", *table, *options])

    return run


def test_parts_run_once_and_failures_are_told(running, tmp_path, capsys):
    said = """-c "import os; print('on', os.environ['CUDA_VISIBLE_DEVICES'], 'in {out}')" """
    parts = [part("said", command=said), part("failing", command='-c "raise SystemExit(3)"')]
    assert running(parts) == 1
    text = capsys.readouterr().out
    assert f"on 0 in {tmp_path}/out" in text or f"on 1 in {tmp_path}/out" in text
    assert "failing: failed, codes [3]" in text
    assert "failed: failing | not begun: none" in text
    assert "on " in (tmp_path / "out/logs/said.log").read_text()
    assert running(parts[:1]) == 0
    assert "said: done before" in capsys.readouterr().out
    assert running(parts[:1], "--again") == 0
    assert "said: done, codes [0]" in capsys.readouterr().out


def test_a_part_leaves_something_for_the_next_one(running):
    leaves = part("leaves", gpus=1, command="-c \"open('{work}/x', 'w')\"")
    takes = part("takes", gpus=1, command="-c \"open('{work}/x')\"")
    assert running([leaves, takes], "--gpus", "0") == 0


def test_no_part_goes_beyond_its_time(running, capsys):
    slow = """-c "import time; time.sleep(60)" """
    assert running([part("slow", seconds=0.5, command=slow), part("late", seconds=900)]) == 1
    text = capsys.readouterr().out
    assert "slow: failed, codes [124]" in text
    assert "not begun: late (no time)" in text


def test_a_launcher_whose_time_is_over_can_end_its_workers(running, tmp_path):
    """As torchrun's, they are in sessions of their own."""
    script, number = tmp_path / "launcher.py", tmp_path / "pid"
    script.write_text(
        "import pathlib, signal, subprocess, sys, time\n"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        "worker = subprocess.Popen(sleep, start_new_session=True)\n"
        "def end(*_):\n"
        "    worker.kill(), worker.wait(), sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        f"pathlib.Path({str(number)!r}).write_text(str(worker.pid))\n"
        "time.sleep(60)\n"
    )
    assert running([part("slow", seconds=2, command=str(script))]) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(int(number.read_text()), 0)


def test_what_is_not_here_is_told(running, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_carry, "UNPACKED", tmp_path)
    needy = Part("needy", "", 1, 1, ("-c pass",), ("fa4",))
    assert running([needy, part("pair", 2)], "--gpus", "0") == 1
    assert "pair (needs 2 GPUs), needy (needs fa4)" in capsys.readouterr().out


def test_what_comes_later_is_waited_for(running, monkeypatch, tmp_path):
    """A model counts when all of it is there."""
    monkeypatch.setattr(gpu_measure, "UNPACKED", tmp_path)
    monkeypatch.setattr(gpu_carry, "UNPACKED", tmp_path)
    reads = "-c \"open('{small}/config.json')\""
    needy = Part("needy", "", 1, 1, (reads,), ("small", "fa4"))

    def unpack():
        (tmp_path / "small/smollm2").mkdir(parents=True)
        (tmp_path / "fa4").mkdir()
        (tmp_path / "fa4/.whole").touch()
        time.sleep(1.5)
        (tmp_path / "small/smollm2/config.json").touch()
        (tmp_path / "small/.whole").touch()

    threading.Thread(target=unpack).start()
    assert running([needy], "--gpus", "0", "--wait", "20") == 0


def test_shortened_documents_are_not_enough_for_every_part(tmp_path):
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl.xz").touch()
    where = WHERE | {name: str(tmp_path / f"{name}.jsonl.xz") for name in ("train", "eval")}
    needy = Part("needy", "", 1, 1, (), ("data", "documents"))
    assert gpu_measure.missing(needy, where) == []
    (tmp_path / gpu_carry.SHORTENED).touch()
    assert gpu_measure.missing(needy, where) == ["documents"]
    (tmp_path / "eval.jsonl.xz").unlink()
    assert gpu_measure.missing(needy, where) == ["data", "documents"]


# Packing


def test_bundles_are_cut_and_joined(tmp_path):
    content = {"a": os.urandom(9000), "b": os.urandom(20000), "c": os.urandom(10)}
    bundles = []
    for name, data in content.items():
        bundles.append(tmp_path / name)
        bundles[-1].write_bytes(data)
    limits = {1: 10000}
    folders = gpu_carry.distribute(
        bundles, tmp_path / "packed", lambda number: limits.get(number, 14000)
    )
    assert [folder.name for folder in folders] == ["1", "2", "3", "4"]
    for folder in folders:
        size = sum(path.stat().st_size for path in folder.iterdir())
        assert size <= limits.get(int(folder.name), 14000)
    joined = gpu_carry.whole_bundles(tmp_path / "packed", tmp_path / "joined")
    assert {name: path.read_bytes() for name, (path, _) in joined.items()} == content
    # What has come so far.
    hidden = folders[-1].rename(tmp_path / "later")
    joined = gpu_carry.whole_bundles(tmp_path / "packed", tmp_path / "joined")
    assert list(joined) == ["a"]
    hidden.rename(folders[-1])
    (folders[0] / "a.0").write_bytes(bytes(5904))
    with pytest.raises(ValueError, match="a: expected parts of one packing"):
        gpu_carry.whole_bundles(tmp_path / "packed", tmp_path / "joined")


def write_wheel(folder, name, files):
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


def test_wheels_are_trimmed_and_installed_where_they_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_carry, "UNPACKED", tmp_path / "unpacked")
    write_wheel(
        tmp_path / "wheels",
        "Some_thing",
        {
            "thing/__init__.py": "x = 1",
            "thing/source.pyx": "",
            "thing/heavy/data.bin": "0" * 1000,
            "Some_thing-1.0.data/purelib/more.py": "y = 2",
            "Some_thing-1.0.data/scripts/tool": "",
            "thing.pth": "thing\nimport sys, thing; sys.path += [thing.__path__[0] + '/inner']\n",
        },
    )
    write_wheel(tmp_path / "wheels", "pytest", {"pytest/__init__.py": "never read"})
    bundle = gpu_carry.Wheels((), {"some-thing": ("/heavy/",)})
    gpu_carry.pack_wheels(bundle, tmp_path / "wheels", tmp_path / "x")
    target = tmp_path / "unpacked/x"
    with tarfile.open(tmp_path / "x") as archive:
        assert gpu_carry.unpack_wheels(archive, target, if_missing=True) == ["some-thing"]
    found = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert found == {"thing/__init__.py", "more.py", "thing.pth"}
    paths = [target, target / "thing", target / "thing/inner"]
    assert gpu_carry.search_path("x") == [str(path) for path in paths]


def test_documents_are_shortened(tmp_path):
    lines = [{"id": index, "kind": "book", "text": "é" * 50} for index in range(3)]
    source = tmp_path / "documents.jsonl.xz"
    source.write_bytes(lzma.compress("\n".join(json.dumps(line) for line in lines).encode()))
    out = io.BytesIO()
    gpu_carry.shorten_documents(source, out, 20)
    shortened = lzma.decompress(out.getvalue()).decode().splitlines()
    assert [json.loads(line) for line in shortened] == [x | {"text": "é" * 20} for x in lines]


def test_what_is_packed_is_unpacked(tmp_path, monkeypatch, capsys):
    for name in ("PACKED", "UNPACKED"):
        monkeypatch.setattr(gpu_carry, name, tmp_path / name)
    here, there = tmp_path / "here", tmp_path / "there"
    monkeypatch.setattr(gpu_carry, "REPOSITORY", here)
    monkeypatch.setattr(gpu_carry, "WHEELS", {"peers": gpu_carry.Wheels(("peer==1.0",))})
    ran = []

    def run(command):
        ran.append(command)
        if "pack" in command:
            write_wheel(here / "build/carry/wheels", "blas", {"blas.py": ""})
            (here / "build/carry/include/cutlass").mkdir(parents=True)
            (here / "build/carry/include/cutlass/cutlass.h").write_text("#pragma once")
        elif "download" in command:
            write_wheel(Path(command[command.index("-d") + 1]), "peer", {"peer.py": ""})
        elif command[-2].endswith(".gguf"):
            (Path(command[-1]) / "config.json").write_text("{}")

    data, work = tmp_path / "data", tmp_path / "work"
    data.mkdir()
    for name in ("train", "eval"):
        (data / f"{name}.jsonl.xz").write_bytes(lzma.compress(b'{"text": "abc"}\n'))
    (tmp_path / "some.gguf").write_bytes(os.urandom(3 * 2**20))
    options = SimpleNamespace(
        **{"python": "3.12", "limit": 1, "first": 2, "characters": 2, "without": []},
        **{"work": work, "data": data, "model": None, "small": tmp_path / "some.gguf"},
        name="smollm2",
    )
    with pytest.raises(FileNotFoundError, match=r"liblemo_ops\.so, which 'make gpu-build' builds"):
        gpu_carry.pack(options, run)
    for name in ("python/lemo/liblemo_ops.so", "build/develop/gpu/lemo_gpu_tests"):
        (here / name).parent.mkdir(parents=True)
        (here / name).write_text("built")
        (here / name).chmod(0o755)
    shutil.rmtree(here / "build/carry")
    ran.clear()
    folders = gpu_carry.pack(options, run)
    assert len(folders) == 3
    assert ran[1][-1] == "peer==1.0"
    monkeypatch.setattr(gpu_carry, "REPOSITORY", there)
    (there / "build/carry/wheels").mkdir(parents=True)
    (there / "build/carry/wheels/older.whl").touch()
    last = folders[-1].rename(tmp_path / "later")
    gpu_carry.unpack(run)
    assert ran[-1] == ["scripts/gpu_session.sh", "setup"]
    found = {str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()}
    assert found == {
        "build/carry/include/cutlass/cutlass.h",
        "build/carry/wheels/blas-1.0-py3-none-any.whl",
        "build/develop/gpu/lemo_gpu_tests",
        "python/lemo/liblemo_ops.so",
    }
    assert os.access(there / "build/develop/gpu/lemo_gpu_tests", os.X_OK)
    assert [name for name in gpu_carry.ORDER if gpu_carry.is_here(name)] == [
        *("session", "peers", "data")
    ]
    last.rename(folders[-1])
    capsys.readouterr()
    gpu_carry.unpack(run)
    assert capsys.readouterr().out.split()[0] == "small", "what is here is left alone"
    folder = tmp_path / "UNPACKED/small/smollm2"
    assert ran[-1][:2] == [sys.executable, gpu_carry.__file__]
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    text = lzma.decompress((tmp_path / "UNPACKED/data/train.jsonl.xz").read_bytes())
    assert json.loads(text) == {"text": "ab"}
    assert (tmp_path / "UNPACKED/data" / gpu_carry.SHORTENED).exists()
