"""The project's sources as git lists them, and what they include and import."""

import ast
import re
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "python/lemo"
SOURCE_ENDINGS = {".cpp", ".h", ".cu", ".py"}


@cache
def tracked_files() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [ROOT / line for line in listing.splitlines() if (ROOT / line).is_file()]


def sources(*folders: str) -> list[Path]:
    """Source files below the folders, which are relative to the root; none may be empty."""
    found = []
    for folder in folders:
        below = [path for path in tracked_files() if path.is_relative_to(ROOT / folder)]
        below = [path for path in below if path.suffix in SOURCE_ENDINGS]
        assert below, f"{folder} has no sources: was it renamed?"
        found += below
    return found


def includes(path: Path) -> list[str]:
    return re.findall(r'#include\s*[<"]([^>"]+)[>"]', path.read_text())


def op_stems() -> set[str]:
    """The families of operators: one header each."""
    shared = {"blocks", "check", "fp8", "grid", "memory_plan", "tensor"}
    stems = {path.stem for path in sources("cpp/include/lemo")}
    assert shared < stems
    return stems - shared


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    """The modules of lemo by their names."""
    return {module_name(path): path for path in sources("python/lemo")}


def imported_names(path: Path) -> set[tuple[str, str | None]]:
    """(module, name) of everything that a file imports, in functions and under TYPE_CHECKING too;
    the name is None for `import module`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {(alias.name, None) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {(node.module, alias.name) for alias in node.names}
    return found


def exported_names(path: Path) -> set[str] | None:
    """The names in a module's `__all__`; None: it has none."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return None


def imported_modules(path: Path) -> set[str]:
    """Modules of lemo that a file imports. `from lemo.ops import rope` is lemo.ops.rope where that
    is a module, else lemo.ops."""
    found = set()
    for module, name in imported_names(path):
        if module.split(".")[0] != "lemo":
            continue
        inner = f"{module}.{name}"
        found.add(inner if inner in modules() or inner == "lemo._C" else module)
    return found


def loaded_modules(name: str) -> set[str]:
    """Modules that an import of module `name` loads: those that it imports, and the packages around
    them that are not around itself."""
    found = set()
    for module in imported_modules(modules()[name]):
        parts = module.split(".")
        around = {".".join(parts[:end]) for end in range(1, len(parts))}
        found |= {module} | {
            package for package in around if not f"{name}.".startswith(package + ".")
        }
    return found - {"lemo._C"}


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Nodes of a cycle, its first one repeated at the end; [] where there is none."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for successor in sorted(graph.get(node, ())):
            if cycle := visit(successor, [*path, node]):
                return cycle
        done.add(node)
        return []

    return next((cycle for node in sorted(graph) if (cycle := visit(node, []))), [])
