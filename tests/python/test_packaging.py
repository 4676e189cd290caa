"""setup.py finds the installed torch, inside and outside an isolated build, and says what to do."""

import importlib.util
import os
import runpy
import site
import subprocess
import sysconfig
from pathlib import Path

import pytest

# setup.py.
pytestmark = pytest.mark.cpu_only

SETUP = Path(__file__).resolve().parents[2] / "setup.py"


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """An empty site-packages that setup.py sees as the interpreter's own, and no other."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    paths = {"purelib": str(tmp_path), "platlib": str(tmp_path)}
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)
    monkeypatch.setattr(site, "getsitepackages", list)
    monkeypatch.setattr(site, "getusersitepackages", lambda: str(tmp_path / "user"))
    return tmp_path


def install_torch(folder: Path, version: str) -> None:
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").touch()
    metadata = folder / f"torch-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")


def test_finds_torch_outside_the_build_environment(packages):
    install_torch(packages, "2.13.0+cpu")
    assert runpy.run_path(str(SETUP))["find_torch"]() == packages / "torch"


def test_without_torch_the_build_says_what_to_install(packages):
    with pytest.raises(SystemExit, match="torch is not installed .* 2.11 or newer. Install one"):
        runpy.run_path(str(SETUP))


def test_an_old_torch_is_named_with_its_version_and_place(packages):
    install_torch(packages, "2.9.1")
    with pytest.raises(SystemExit, match=r"torch 2.9.1 in .*torch is too old.*2.11 or newer"):
        runpy.run_path(str(SETUP))


@pytest.mark.parametrize(
    ("settings", "gpu", "leaves_out"),
    [
        ([], False, True),
        ([], True, False),
        (["CUDA=1"], False, False),
        (["CMAKE_ARGS=-DLEMO_CUDA_ARCHITECTURES=90"], False, False),
    ],
)
def test_make_leaves_cuda_out_where_no_gpu_is_visible_and_nobody_asks(
    settings, gpu, leaves_out, tmp_path
):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nexit {0 if gpu else 9}\n")
    program.chmod(0o755)
    venv = tmp_path / "venv"
    commands = subprocess.run(
        ["make", "-n", f"VENV={venv}", *settings, f"{venv}/.lemo"],
        cwd=SETUP.parent,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert ("-DLEMO_CUDA=OFF" in commands) == leaves_out
    assert ("CUDA kernels are left out" in commands) == leaves_out


@pytest.mark.parametrize("options", ["-DLEMO_CUDA=OFF", "-DLEMO_CUTLASS_INCLUDE=/headers", ""])
def test_cutlass_is_fetched_only_where_it_is_needed(packages, monkeypatch, options):
    install_torch(packages, "2.13.0+cpu")
    monkeypatch.setenv("CMAKE_ARGS", options)
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    requirements = runpy.run_path(str(SETUP))["cuda_build_requirements"]()
    assert requirements == ([] if options else ["nvidia-cutlass==4.2.0.0"])
