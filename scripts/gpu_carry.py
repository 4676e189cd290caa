"""What a GPU machine without a network needs for `gpu_measure.py`: packing it, and unpacking it.

Everything is a bundle, a compressed archive: what sets up lemo and what was built of it, wheels
without the files that nobody reads there, the model, the documents. The bundles follow each other
in folders of limited size, which are named by the order in which they are carried; a bundle that
does not fit is cut. What has come of it so far is unpacked.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

REPOSITORY = Path(__file__).resolve().parents[1]
PACKED, UNPACKED = REPOSITORY / "build/packed", REPOSITORY / "build/unpacked"
# Of the tree: what `gpu_session.sh pack` collects, and what `make gpu-build` has built.
CARRY = "build/carry"
BUILT = ("python/lemo/liblemo_ops.so", "build/develop/gpu/lemo_gpu_tests")
MANIFEST, WHOLE, SHORTENED, MIB = "bundles.json", ".whole", "shortened", 2**20

GLIBC = ("1", "2014", "_2_17", "_2_24", "_2_27", "_2_28", "_2_31", "_2_34", "_2_35", "_2_39")
# Prints what Python puts on its path for a folder of packages.
ADDED_PATHS = """
import site, sys
known = [*sys.path]
site.addsitedir(sys.argv[1])
print(*(path for path in sys.path if path not in known), sep="\\n")
"""
NOT_READ = (r"\.(pyx|pxd|pxi|pyi|lib|a)$", r"\.data/(scripts|headers|data)/")


@dataclass(frozen=True)
class Wheels:
    """Packages of a bundle, in the versions that were measured.

    Args:
        packages: what pip is asked for, each alone, without what it depends on.
        dropped: of a package's name, patterns of paths that are left out besides NOT_READ.
        if_missing: unpacks only packages that the other machine does not have.
    """

    packages: tuple[str, ...]
    dropped: dict[str, tuple[str, ...]] = field(default_factory=dict)
    if_missing: bool = False


# In the order in which they are carried.
WHEELS = {
    "peers": Wheels(
        (
            *("liger-kernel==0.8.5", "unsloth==2026.10.9", "unsloth_zoo==2026.10.9"),
            *("cut-cross-entropy==25.1.1", "trl==1.15.0", "datasets==4.8.5"),
            *("bitsandbytes==0.50.2", "einops", "msgspec", "dill==0.4.1"),
            *("multiprocess==0.70.19", "xxhash"),
        ),
        {
            "bitsandbytes": (r"libbitsandbytes_(?!cpu|cuda130)\w+\.so$",),
            "unsloth": (r"^studio/",),
        },
    ),
    "tests": Wheels(("pytest-xdist", "execnet", "trl==1.16.0")),
    "torchao": Wheels(("torchao==0.18.0",)),
    "tables": Wheels(
        ("pyarrow==26.0.1", "pandas==3.1.1", "python-dateutil", "six", "pytz", "tzdata"),
        {
            "pyarrow": (
                *("flight", r"/_s3fs", r"libarrow_s3", r"^pyarrow/(include|src)/"),
                *(r"libarrow_\w+\.so$", r"\.so\.\d+\.\d+\.\d+$"),  # the same libraries again
                r"/tests/",
            ),
            "pandas": (r"/tests/",),
        },
        if_missing=True,
    ),
    "extras": Wheels(
        (
            *("requests", "urllib3", "idna", "certifi", "charset-normalizer", "typing-extensions"),
            *("httpx", "httpcore", "h11", "anyio", "sniffio"),
        ),
        if_missing=True,
    ),
    "fa4": Wheels(
        (
            *("flash-attn-4==4.0.0b36", "nvidia-cutlass-dsl==4.8.1"),
            *("nvidia-cutlass-dsl-libs-base==4.8.1", "nvidia-cutlass-dsl-libs-core==4.8.1"),
            *("nvidia-cutlass-dsl-libs-cu13==4.8.1", "quack-kernels==0.6.5"),
            *("apache-tvm-ffi==0.1.15.post2", "torch-c-dlpack-ext==0.1.5", "einops"),
        ),
        {
            "nvidia-cutlass-dsl-libs-base": (r"/iket/",),
            "nvidia-cutlass-dsl-libs-cu13": (r"/stubs/",),
        },
    ),
}
# Peers and tests first: what most parts need has to come first.
ORDER = (
    "session",
    "peers",
    "tests",
    "torchao",
    "extras",
    "tables",
    "data",
    "small",
    "model",
    "fa4",
)


def normal(name: str) -> str:
    """A package's name as pip compares names: "cut-cross-entropy" of "cut_cross_entropy"."""
    return re.sub(r"[-_.]+", "-", name).lower()


def download(packages: Iterable[str], folder: Path, python: str) -> list[str]:
    """pip's command that fetches wheels for another machine's Python."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    for glibc in GLIBC:
        command += ["--platform", f"manylinux{glibc}_x86_64"]
    return [*command, "-d", str(folder), *packages]


def files_of_wheel(wheel: Path, dropped: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """(path in an installation, content) of the files of a wheel that are carried."""
    pattern = re.compile("|".join((*NOT_READ, *dropped)))
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            if not entry.is_dir() and not pattern.search(entry.filename):
                path = re.sub(r"^[^/]+\.data/(purelib|platlib)/", "", entry.filename)
                yield path, archive.read(entry)


def add(archive: tarfile.TarFile, path: str, content: bytes) -> None:
    member = tarfile.TarInfo(path)
    member.size, member.mode = len(content), 0o755 if ".so" in path else 0o644
    archive.addfile(member, io.BytesIO(content))


def pack_wheels(bundle: Wheels, wheels: Path, target: Path) -> None:
    """An archive of a bundle; its paths begin with the package's name."""
    with tarfile.open(target, "w:xz", preset=6) as archive:
        for wheel in sorted(wheels.glob("*.whl")):
            name = normal(wheel.name.split("-")[0])
            for path, content in files_of_wheel(wheel, bundle.dropped.get(name, ())):
                add(archive, f"{name}/{path}", content)


def shorten_documents(source: Path, target: BinaryIO, characters: int) -> None:
    """Copies documents ({id, kind, text} a line) with so many first characters of each; 0: all."""
    with lzma.open(source, "rt") as lines, lzma.open(target, "wt", preset=6) as out:
        for line in lines:
            document = json.loads(line)
            document["text"] = document["text"][: characters or None]
            out.write(json.dumps(document, ensure_ascii=False) + "\n")


def pack_documents(data: Path, target: Path, characters: int) -> None:
    with tarfile.open(target, "w") as archive:
        for name in ("train.jsonl.xz", "eval.jsonl.xz"):
            content = io.BytesIO()
            shorten_documents(data / name, content, characters)
            add(archive, name, content.getvalue())
        if characters:
            add(archive, SHORTENED, b"")


def pack_folder(source: Path, target: Path, name: str) -> None:
    """An archive of a folder of the name `name`, with a file or with a folder's files."""
    with tarfile.open(target, "w:xz", preset=6) as archive:
        for path in sorted(source.iterdir()) if source.is_dir() else [source]:
            archive.add(path, f"{name}/{path.name}")


def pack_session(target: Path) -> None:
    """An archive of CARRY and BUILT, with their paths in the tree.

    Raises:
        FileNotFoundError: something was not built.
    """
    for name in BUILT:
        if not (REPOSITORY / name).is_file():
            raise FileNotFoundError(f"expected {name}, which 'make gpu-build' builds")
    with tarfile.open(target, "w:xz", preset=6) as archive:
        for name in (CARRY, *BUILT):
            archive.add(REPOSITORY / name, name)


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def distribute(bundles: Iterable[Path], folder: Path, sizes: Callable[[int], int]) -> list[Path]:
    """Cuts bundles into numbered folders.

    Args:
        bundles: files, in the order in which they are carried.
        folder: where the numbered folders are made.
        sizes: bytes that the folder of a number, from 1 on, may have.

    Returns: the folders. Each has a MANIFEST of {bundle: [digest, parts so far, last part]}.
    """
    made: list[Path] = []
    room, manifest = 0, {}

    def close() -> None:
        if made:
            (made[-1] / MANIFEST).write_text(json.dumps(manifest))

    for bundle in bundles:
        size, part, digest = bundle.stat().st_size, 0, digest_of(bundle)
        with bundle.open("rb") as source:
            while source.tell() < size:
                if room <= 0:
                    close()
                    manifest = {}
                    made.append(folder / str(len(made) + 1))
                    made[-1].mkdir(parents=True)
                    # The manifest's own place.
                    room = sizes(len(made)) - 4096
                content = source.read(room)
                (made[-1] / f"{bundle.name}.{part}").write_bytes(content)
                room -= len(content)
                part += 1
                manifest[bundle.name] = [digest, part, source.tell() == size]
    close()
    return made


def whole_bundles(folder: Path, target: Path) -> dict[str, tuple[Path, str]]:
    """Joins the bundles of which every part has come, in folder `target`.

    Returns: {bundle: (file, digest)}.

    Raises:
        ValueError: parts that do not belong together.
    """
    parts: dict[str, dict[int, Path]] = {}
    ends: dict[str, tuple[str, int]] = {}
    for manifest in sorted(folder.glob(f"*/{MANIFEST}")):
        for name, (digest, count, last) in json.loads(manifest.read_text()).items():
            for path in manifest.parent.glob(f"{name}.*"):
                parts.setdefault(name, {})[int(path.suffix[1:])] = path
            if last:
                ends[name] = digest, count
    joined = {}
    for name, (digest, count) in ends.items():
        if parts[name].keys() != set(range(count)):
            continue
        target.mkdir(parents=True, exist_ok=True)
        joined[name] = target / name, digest
        with joined[name][0].open("wb") as out:
            for index in range(count):
                out.write(parts[name][index].read_bytes())
        if digest_of(joined[name][0]) != digest:
            raise ValueError(f"{name}: expected parts of one packing in {folder}, got others")
    return joined


def has(package: str) -> bool:
    """Whether this machine's Python has a package."""
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def unpack_wheels(archive: tarfile.TarFile, target: Path, if_missing: bool) -> list[str]:
    """Extracts a bundle of `pack_wheels`; returns the packages that were extracted."""
    there: dict[str, bool] = {}
    for member in archive:
        package, _, path = member.name.partition("/")
        if there.setdefault(package, if_missing and has(package)):
            continue
        member.name = path
        archive.extract(member, target, filter="data")
    return sorted(package for package, skipped in there.items() if not skipped)


def search_path(name: str) -> list[str]:
    """What a bundle of wheels puts on Python's path: its folder, and what its .pth files say."""
    command = [sys.executable, "-c", ADDED_PATHS, str(UNPACKED / name)]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return found.stdout.removesuffix("\n").split("\n")


def is_here(name: str) -> bool:
    return (UNPACKED / name / WHOLE).exists()


def pack(options: Any, run: Callable[[list[str]], None]) -> list[Path]:
    """Fetches, trims and packs everything.

    Args:
        options: of the command line, see gpu_measure.py.
        run: runs a command.
    """
    made = options.work / "bundles"
    for folder in (PACKED, made):
        shutil.rmtree(folder, ignore_errors=True)
    made.mkdir(parents=True)
    run(["scripts/gpu_session.sh", "pack", "--for", options.python, "--wheel", "gguf"])
    pack_session(made / "session")
    for name, bundle in WHEELS.items():
        if name not in options.without:
            wheels = options.work / "wheels" / name
            # Other versions of an earlier time are not packed.
            shutil.rmtree(wheels, ignore_errors=True)
            run(download(bundle.packages, wheels, options.python))
            pack_wheels(bundle, wheels, made / name)
    if options.data:
        pack_documents(options.data, made / "data", options.characters)
    if options.model:
        pack_folder(options.model, made / "model", options.model.name)
    if options.small:
        pack_folder(options.small, made / "small", options.name)
    bundles = [made / name for name in ORDER if (made / name).exists()]
    limits = options.first * MIB, options.limit * MIB
    return distribute(bundles, PACKED, lambda number: limits[number > 1])


def unpack(run: Callable[[list[str]], None]) -> None:
    """Unpacks what has come so far and is not unpacked yet."""
    for name, (path, digest) in whole_bundles(PACKED, UNPACKED / "joined").items():
        target = UNPACKED / name
        if is_here(name) and (target / WHOLE).read_text() == digest:
            continue
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        with tarfile.open(path) as archive:
            if name in WHEELS:
                packages = unpack_wheels(archive, target, WHEELS[name].if_missing)
                print(name, *packages)
            else:
                archive.extractall(target, filter="data")
                print(name, *sorted(x.name for x in target.iterdir()))
        if name == "session":
            shutil.rmtree(REPOSITORY / CARRY, ignore_errors=True)
            shutil.copytree(target, REPOSITORY, dirs_exist_ok=True)
            run(["scripts/gpu_session.sh", "setup"])
        for file in target.glob("*/*.gguf"):
            run([sys.executable, __file__, str(file), str(file.parent)])
            file.unlink()
        (target / WHOLE).write_text(digest)
    shutil.rmtree(UNPACKED / "joined", ignore_errors=True)


def convert_gguf(source: Path, target: Path) -> None:
    """Makes a Transformers folder of a model in a GGUF file, in bf16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, file = str(source.parent), source.name
    stored = GgufConfig(dequantize=True, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, quantization_config=stored, dtype=torch.bfloat16
    )
    # It is stored as any model in bf16 is.
    vars(model.config).pop("quantization_config", None)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(target)


def run_here(command: list[str]) -> None:
    subprocess.run(command, check=True, cwd=REPOSITORY)


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY / "build/site"))
    convert_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
