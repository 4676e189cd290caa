"""Rules that keep the code's shape: layers, frozen lists, file sizes (DESIGN.md, section 2)."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

# Source text, by git's list of files.
pytestmark = pytest.mark.cpu_only

ROOT = Path(__file__).resolve().parents[2]

EXPECTED_OPS = {
    "block_scores",
    "linear_cross_entropy",
    "predictor",
    "predictor_backward",
    "residual_scatter",
    "gather_rows",
    "rope",
    "segment_attention",
    "segment_attention_backward",
    "select_norm",
    "select_norm_backward",
    "swiglu",
    "swiglu_backward",
    "token_select",
}

EXPECTED_CONFIG_FIELDS = {
    "block_size",
    "keep",
    "scorer",
    "predictor",
    "keep_first",
    "keep_last",
    "visible_keys",
    "mask_loss",
    "burn_in",
    "loss_chunk",
    "recompute",
    "seed",
    "layerwise",
    "layerwise.policy",
    "layerwise.keep",
    "layerwise.keep_mlp",
    "layerwise.thresholds",
    "layerwise.mlp_thresholds",
    "layerwise.dense_layers",
    "layerwise.select_at",
    "layerwise.keep_schedule",
    "layerwise.group_size",
}

STABLE_ABI = ("torch/csrc/stable/", "torch/csrc/inductor/aoti_torch/c/", "torch/headeronly/")

SOURCE_ENDINGS = {".cpp", ".h", ".cu", ".cuh", ".py"}


def tracked_files() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [ROOT / line for line in listing.splitlines() if (ROOT / line).is_file()]


def sources(*folders: str) -> list[Path]:
    return [
        path
        for path in tracked_files()
        if path.suffix in SOURCE_ENDINGS and path.relative_to(ROOT).parts[0] in folders
    ]


def includes(path: Path) -> list[str]:
    return re.findall(r'#include\s*[<"]([^>"]+)[>"]', path.read_text())


def imported_modules(path: Path) -> list[str]:
    """Modules of lemo that a file imports; `from lemo import a, b` counts as lemo.a and lemo.b."""
    text = path.read_text()
    modules = re.findall(r"^\s*(?:from|import)\s+(lemo\.[\w.]+)", text, re.MULTILINE)
    for names in re.findall(r"^\s*from lemo import ([^(\n]+)", text, re.MULTILINE):
        modules += [f"lemo.{name.split()[0]}" for name in names.split(",")]
    return modules


def test_the_core_knows_neither_torch_nor_python_nor_cuda():
    for path in sources("cpp"):
        for header in includes(path):
            assert not re.match(r"(torch|ATen|c10|pybind11|cuda|cutlass|cute)\b", header), (
                f"{path.name} includes {header}"
            )


def test_contracts_use_the_standard_library_only():
    for path in (ROOT / "cpp" / "include").rglob("*.h"):
        for header in includes(path):
            assert header.startswith("lemo/") or ("/" not in header and "." not in header), (
                f"{path.name} includes {header}"
            )


def test_cuda_knows_no_torch_and_bindings_no_cutlass():
    for path in sources("cuda"):
        assert not [h for h in includes(path) if re.match(r"(torch|ATen|c10|pybind11)/", h)], path
    for path in sources("bindings"):
        assert not [h for h in includes(path) if re.match(r"(cutlass|cute)/", h)], path


def test_bindings_use_the_stable_abi_only():
    for path in sources("bindings"):
        for header in includes(path):
            if header.startswith(("torch/", "ATen/", "c10/")):
                assert header.startswith(STABLE_ABI), f"{path.name} includes {header}"


def op_stems() -> set[str]:
    shared = {"blocks", "check", "tensor"}
    return {path.stem for path in (ROOT / "cpp/include/lemo").glob("*.h")} - shared


def test_an_op_includes_no_other_op():
    for stem in op_stems():
        for folder in ("cpp/include/lemo", "cpp/src", "cuda", "bindings"):
            for path in (ROOT / folder).glob(f"{stem}.*"):
                others = {Path(header).stem for header in includes(path)} & (op_stems() - {stem})
                assert not others, f"{path} includes {others}"


def test_every_op_has_the_files_of_its_stem():
    for stem in op_stems():
        for path in (
            f"cpp/src/{stem}.cpp",
            f"bindings/{stem}.cpp",
            f"python/lemo/ops/{stem}.py",
            f"tests/cpp/test_{stem}.cpp",
            f"tests/python/test_{stem}.py",
            f"benchmarks/cpp/bench_{stem}.cpp",
        ):
            assert (ROOT / path).is_file(), f"op '{stem}' lacks {path}"
        oracle = (ROOT / "python/lemo/reference.py").read_text()
        assert f"\ndef {stem}(" in oracle, f"op '{stem}' has no oracle"


def test_every_cuda_op_has_its_tests_and_benchmarks():
    for stem in op_stems():
        if not (ROOT / f"cuda/{stem}.cu").is_file() and not (ROOT / f"cuda/{stem}").is_dir():
            continue
        for path in (
            f"tests/cuda/test_{stem}.cpp",
            f"benchmarks/cuda/bench_{stem}.cpp",
            f"benchmarks/gpu/{stem}.py",
        ):
            assert (ROOT / path).is_file(), f"op '{stem}' has a CUDA kernel but lacks {path}"


def test_versions_agree():
    import lemo
    from lemo import _C

    assert _C.build_info()["version"] == lemo.__version__


def test_design_states_the_schemas():
    """Every schema that the bindings define stands in DESIGN.md, argument for argument."""
    design = re.sub(r"\s+", " ", (ROOT / "docs/DESIGN.md").read_text())
    for path in sources("bindings"):
        for call in re.findall(r"m\.def\(\s*((?:\"[^\"]*\"\s*)+)\)", path.read_text()):
            schema = "".join(re.findall(r'"([^"]*)"', call))
            name, arguments = schema.split("(", 1)
            assert f"`{name}` | `({arguments}`" in design, f"docs/DESIGN.md lacks {schema}"


# Which packages of lemo a package may import, besides itself.
LAYERS = {
    "ops": {"_C", "packing"},
    "reference": set(),
    "packing": {"_C", "ops"},
    "settings": set(),
    "files": set(),
}
UPPER = {"cli", "demo", "preparation", "training", "report", "data"}


@pytest.mark.parametrize("package", sorted(LAYERS))
def test_lower_layers_import_nothing_above(package):
    for path in sources("python"):
        parts = path.relative_to(ROOT / "python/lemo").with_suffix("").parts
        if parts[0] != package:
            continue
        for module in imported_modules(path):
            top = module.split(".")[1]
            assert top in LAYERS[package] | {package}, f"{path} imports {module}"


def test_the_method_does_not_import_training_or_the_command_line():
    for path in sources("python"):
        top = path.relative_to(ROOT / "python/lemo").with_suffix("").parts[0]
        if top in UPPER or top == "__main__":
            continue
        for module in imported_modules(path):
            assert module.split(".")[1] not in UPPER, f"{path} imports {module}"


def test_nothing_uses_the_oracle_but_tests():
    for path in sources("python"):
        assert path.name == "reference.py" or "lemo.reference" not in path.read_text(), path


def test_the_list_of_ops_is_frozen():
    import lemo.ops  # noqa: F401

    names = {
        name.removeprefix("lemo::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("lemo::")
    }
    assert names == EXPECTED_OPS


def test_the_fields_of_the_config_are_frozen():
    from lemo import LemoConfig
    from lemo.settings.base import fields_of

    assert {name for name, _ in fields_of(LemoConfig)} == EXPECTED_CONFIG_FIELDS


def test_lemo_reads_no_environment_variables():
    for path in sources("python", "cpp", "cuda", "bindings"):
        assert not re.search(r"os\.environ|os\.getenv|\bgetenv\(", path.read_text()), path


def test_design_lists_every_op():
    design = (ROOT / "docs/DESIGN.md").read_text()
    for name in EXPECTED_OPS:
        assert f"`{name}`" in design, f"docs/DESIGN.md does not mention {name}"


def test_files_and_lines_stay_short():
    folders = ("python", "cpp", "cuda", "bindings", "tests", "benchmarks")
    for path in sources(*folders):
        lines = path.read_text().splitlines()
        assert len(lines) <= 600, f"{path} has {len(lines)} lines"
        for number, line in enumerate(lines, 1):
            assert len(line) <= 100, f"{path}:{number} has {len(line)} columns"
