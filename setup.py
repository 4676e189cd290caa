"""Builds lemo's native parts through CMake, against the torch that is already installed.

torch is found, never imported and never downloaded: in an isolated build the installed package
lies outside the build environment, so it is looked up in the interpreter's own site-packages.
"""

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MINIMUM_TORCH = (2, 11)
CUTLASS = "nvidia-cutlass==4.2.0.0"


def installed_package(name: str) -> Path | None:
    """Folder of an installed package, inside this environment or outside an isolated build."""
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    paths = sysconfig.get_paths()
    folders = [paths["purelib"], paths["platlib"], *site.getsitepackages()]
    for folder in [*folders, site.getusersitepackages()]:
        if (Path(folder) / name / "__init__.py").exists():
            return Path(folder) / name
    return None


def find_torch() -> Path:
    """Folder of an installed torch that is new enough; otherwise ends the build with what to do."""
    remedy = (
        f"lemo compiles against the torch that is installed and needs version "
        f"{'.'.join(map(str, MINIMUM_TORCH))} or newer. Install one that fits your machine first "
        f"(https://pytorch.org/get-started/locally), for example '{sys.executable} -m pip install "
        "torch', then run 'pip install .' again. Nothing was downloaded."
    )
    folder = installed_package("torch")
    if folder is None:
        raise SystemExit(f"error: torch is not installed for {sys.executable}. {remedy}")
    found = importlib.metadata.distributions(name="torch", path=[str(folder.parent)])
    version = next((distribution.version for distribution in found), "0")
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < MINIMUM_TORCH:
        raise SystemExit(f"error: torch {version} in {folder} is too old. {remedy}")
    return folder


def cuda_build_requirements() -> list[str]:
    """CUTLASS's headers, where there is an nvcc to compile them and none are installed."""
    options = os.environ.get("CMAKE_ARGS", "")
    settled = "LEMO_CUDA=OFF" in options or "LEMO_CUTLASS_INCLUDE=" in options
    if settled or shutil.which("nvcc") is None or installed_package("cutlass_library"):
        return []
    return [CUTLASS]


class CMakeBuild(build_ext):
    """Configures, builds and installs the CMake project into the package folder."""

    def run(self) -> None:
        package = Path(self.get_ext_fullpath("lemo._C")).resolve().parent
        build = Path(self.build_temp).resolve()
        configure = [
            *("cmake", "--fresh", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DPython3_EXECUTABLE={sys.executable}",
            f"-DLEMO_TORCH_DIR={find_torch()}",
            f"-DCMAKE_INSTALL_PREFIX={package.parent}",
        ]
        cutlass = installed_package("cutlass_library")
        if cutlass is not None:
            configure.append(f"-DLEMO_CUTLASS_INCLUDE={cutlass / 'source' / 'include'}")
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        subprocess.run(["cmake", "--install", str(build)], check=True)


find_torch()
setup(
    ext_modules=[Extension("lemo._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=cuda_build_requirements(),
)
