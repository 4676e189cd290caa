"""Rules that keep the code's shape: layers, names of files, frozen lists, sizes.

docs/design/layers.md states them.
"""

import re

import pytest
import torch

from source_tree import (
    ROOT,
    exported_names,
    find_cycle,
    imported_modules,
    imported_names,
    includes,
    loaded_modules,
    modules,
    op_stems,
    sources,
)

# Source text, by git's list of files.
pytestmark = pytest.mark.cpu_only

EXPECTED_OPS = {
    "bf16_split",
    "bf16_split_all",
    "block_attention",
    "block_scores",
    "fp8_rows",
    "fp8_transpose",
    "gather_rows",
    "linear_cross_entropy",
    "predictor",
    "predictor_backward",
    "residual_scatter",
    "rope",
    "segment_attention",
    "segment_attention_backward",
    "select_norm",
    "select_norm_backward",
    "swiglu",
    "swiglu_backward",
    "swiglu_fp8",
    "token_select",
    "word_relevance",
}

EXPECTED_FUNCTIONS = {
    "bf16_split",
    "bf16_split_all",
    "block_attention",
    "block_scores",
    "fp8_product",
    "fp8_rows",
    "fp8_transpose",
    "left_out",
    "linear_cross_entropy",
    "marked_blocks",
    "predictor",
    "residual_gather",
    "residual_scatter_",
    "residual_select_norm",
    "rope",
    "segment_attention",
    "select_norm",
    "supports_device",
    "swiglu",
    "swiglu_fp8",
    "token_select",
    "word_relevance",
}

EXPECTED_CONFIG_FIELDS = {
    "block_size",
    "keep",
    "keep_relevance",
    "keep_least",
    "keep_tokens",
    "scorer",
    "predictor",
    "heads",
    "scores",
    "keep_first",
    "keep_last",
    "visible_keys",
    "mask_loss",
    "burn_in",
    "loss_chunk",
    "recompute",
    "offload",
    "host_memory",
    "cuda_graphs",
    "head_groups",
    "path",
    "products",
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

# Parts of lemo from the top down. A part imports parts of its own row and of rows below it.
LAYERS = [
    {"cli", "demo"},
    {"report", "training", "preparation", "data"},
    {"__init__"},  # what `import lemo` gives
    {"models", "attention"},
    {"planner"},
    {"selection"},
    {"predictors", "relevance", "distributed"},
    {"ops"},
    {"packing"},
    {"_C"},
]
# The same of what is inside `lemo.models`; its own modules stand in the first row.
IN_MODELS = [{"generic"}, {"layers"}, {"projections"}, {"calls"}, {"memory"}]
# Imported by everybody; they import nothing of lemo.
COMMON = {"settings", "files", "memory_errors"}
# What stands outside: `python -m lemo`, and the oracle of the tests.
OUTSIDE = {"__main__", "reference"}


def part_of(module: str) -> str:
    """The part of lemo that a module belongs to: "ops" of lemo.ops.rope."""
    return module.split(".")[1] if "." in module else "__init__"


def test_the_core_knows_neither_torch_nor_python_nor_cuda():
    for path in sources("cpp"):
        for header in includes(path):
            assert not re.match(r"(torch|ATen|c10|pybind11|cuda|cutlass|cute)\b", header), (
                f"{path.name} includes {header}"
            )


def test_contracts_use_the_standard_library_only():
    for path in sources("cpp/include"):
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
    headers = {
        header
        for path in sources("bindings")
        for header in includes(path)
        if header.startswith(("torch/", "ATen/", "c10/"))
    }
    assert headers, "the bindings include nothing of torch"
    assert not {header for header in headers if not header.startswith(STABLE_ABI)}


def files_of(stem: str) -> list:
    """The sources of one operator: the files of its name, and those of its folder of kernels."""
    found = [
        path
        for path in sources("cpp", "cuda", "bindings")
        if path.stem == stem or path.is_relative_to(ROOT / "cuda" / stem)
    ]
    assert len(found) >= 3, f"op '{stem}' has {len(found)} sources"
    return found


def stem_of(header: str) -> str:
    """The operator that an included header belongs to, if any: by its folder, or by its name."""
    folder, _, name = header.partition("/")
    return folder if folder in op_stems() else name.removesuffix(".h")


@pytest.mark.parametrize("stem", sorted(op_stems()))
def test_an_op_includes_no_other_op(stem):
    others = op_stems() - {stem}
    assert others
    for path in files_of(stem):
        included = {stem_of(header) for header in includes(path)} & others
        assert not included, f"{path} includes {included}"


def test_what_operators_share_includes_no_op():
    shared = [path for path in sources("cpp/include", "cuda/common") if path.stem not in op_stems()]
    assert len(shared) > 3
    for path in shared:
        included = {stem_of(header) for header in includes(path)} & op_stems()
        assert not included, f"{path} includes {included}"


@pytest.mark.parametrize("stem", sorted(op_stems()))
def test_every_op_has_the_files_of_its_stem(stem):
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


def cuda_stems() -> list[str]:
    """The operators that have CUDA kernels, by their folders."""
    folders = {path.relative_to(ROOT / "cuda").parts[0] for path in sources("cuda")}
    stems = folders - {"common"}
    assert stems, "no operator has CUDA kernels"
    return sorted(stems)


@pytest.mark.parametrize("stem", cuda_stems())
def test_every_cuda_op_has_its_entry_its_tests_and_benchmarks(stem):
    assert stem in op_stems(), f"cuda/{stem} belongs to no operator"
    for path in (
        f"cuda/{stem}/entry.cu",
        f"tests/cuda/test_{stem}.cpp",
        f"benchmarks/cuda/bench_{stem}.cpp",
        f"benchmarks/gpu/{stem}.py",
    ):
        assert (ROOT / path).is_file(), f"op '{stem}' has a CUDA kernel but lacks {path}"


@pytest.mark.parametrize("stem", cuda_stems())
def test_kernels_stand_in_the_folder_of_their_tier_and_in_its_namespace(stem):
    tiers = set()
    for path in sources(f"cuda/{stem}"):
        folder = path.relative_to(ROOT / "cuda").parent.parts
        tiers |= {*folder[1:]}
        named = re.findall(r"^namespace (lemo[\w:]*) {", path.read_text(), re.MULTILINE)
        expected = "::".join(("lemo", "cuda", *folder)) if path.name != "entry.cu" else "lemo"
        assert expected in named, f"{path} is not of namespace {expected}"
    assert tiers in ({"portable"}, {"portable", "hopper"})


def test_versions_agree():
    import lemo
    from lemo import _C

    assert _C.build_info()["version"] == lemo.__version__


def test_the_pages_state_the_schemas():
    """docs/design/operators.md has the schemas of the bindings, argument for argument."""
    page = (ROOT / "docs/design/operators.md").read_text()
    stated = dict(re.findall(r"^\| `(\w+)` \| `(\(.*\) -> .*)` \|$", page, re.MULTILINE))
    literal = r'"((?:[^"\\]|\\.)*)"'
    defined = {}
    for path in sources("bindings"):
        for call in re.findall(rf"m\.def\(\s*((?:{literal}\s*)+)\)", path.read_text()):
            schema = "".join(re.findall(literal, call[0])).replace(r"\"", '"')
            name, arguments = schema.split("(", 1)
            defined[name] = f"({arguments}"
    assert stated == defined
    assert stated.keys() == EXPECTED_OPS


def test_imports_have_no_cycle():
    """Imports in functions and under TYPE_CHECKING count, too."""
    graph = {name: loaded_modules(name) for name in modules()}
    assert sum(map(len, graph.values())) > len(graph)
    cycle = find_cycle(graph)
    assert not cycle, "a cycle of imports: " + " -> ".join(cycle)


def test_a_cycle_is_found():
    assert find_cycle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}) == ["b", "d", "b"]
    assert find_cycle({"a": {"a"}}) == ["a", "a"]
    assert not find_cycle({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}})


def test_every_part_of_lemo_has_a_layer():
    named = set().union(*LAYERS)
    parts = {part_of(module) for module in modules()}
    assert parts == (named - {"_C"}) | COMMON | OUTSIDE


@pytest.mark.parametrize("part", sorted(set().union(*LAYERS) - {"_C"} | COMMON | {"reference"}))
def test_imports_go_down(part):
    rows = [row for row, parts in enumerate(LAYERS) if part in parts]
    below = set().union(*LAYERS[rows[0] :], COMMON) if rows else {part}
    paths = [path for name, path in modules().items() if part_of(name) == part]
    assert paths
    for path in paths:
        for module in imported_modules(path):
            assert part_of(module) in below, f"{path} imports {module}"


def test_imports_go_down_in_models():
    packages = set().union(*IN_MODELS)
    inside = {name: path for name, path in modules().items() if name.startswith("lemo.models.")}
    assert packages == {name.split(".")[2] for name in inside if name.count(".") > 2}
    for name, path in inside.items():
        package = name.split(".")[2]
        rows = [row for row, names in enumerate(IN_MODELS) if package in names]
        # Modules of `models` itself import all of it.
        above = set().union(*IN_MODELS[: rows[0]]) if rows else set()
        for module in imported_modules(path):
            if rows and module.startswith("lemo.models."):
                own = module.split(".")[2]
                allowed = own in packages - above or (rows[0] == 0 and own not in packages)
                assert allowed, f"{path} imports {module}"


def test_nothing_uses_the_oracle_but_tests():
    paths = [path for path in modules().values() if path.name != "reference.py"]
    assert len(paths) == len(modules()) - 1
    for path in paths:
        assert "lemo.reference" not in imported_modules(path), path


def is_private(name: str | None) -> bool:
    return name is not None and name.startswith("_") and not name.startswith("__")


def test_private_names_stay_in_their_module_and_private_modules_in_their_package():
    found = 0
    for importer, path in modules().items():
        for module, name in imported_names(path):
            if module.split(".")[0] != "lemo" or name == "_C":
                continue
            inner = f"{module}.{name}"
            if inner not in modules():
                assert not is_private(name), f"{path} imports {name} of {module}"
                inner = module
            package, _, last = inner.rpartition(".")
            if is_private(last) and last != "_C":
                assert f"{importer}.".startswith(f"{package}."), f"{path} imports {inner}"
                found += 1
    assert found, "no module is private any more"


def test_modules_export_what_others_import_of_them():
    exports = {module: exported_names(path) for module, path in modules().items()}
    assert any(exports.values())
    inner = {*modules(), "lemo._C"}
    for path in modules().values():
        for module, name in imported_names(path):
            if name is None or f"{module}.{name}" in inner or exports.get(module) is None:
                continue
            assert name in exports[module], f"{path.name} imports {name}, not exported by {module}"


def test_benchmarks_and_examples_import_no_private_names():
    imported = {
        (path.name, module, name)
        for path in sources("benchmarks", "examples")
        if path.suffix == ".py"
        for module, name in imported_names(path)
        if module.split(".")[0] == "lemo"
    }
    assert imported
    for path, module, name in imported:
        assert not is_private(name), f"{path} imports {name} of {module}"
        assert not any(map(is_private, module.split("."))), f"{path} imports {module}"


def test_tests_import_no_tests():
    paths = sources("tests/python")
    assert any(path.name.startswith("test_") for path in paths)
    for path in paths:
        for module, _ in imported_names(path):
            assert not module.startswith("test_"), f"{path.name} imports {module}"


def test_the_list_of_ops_is_frozen():
    import lemo.ops

    names = {
        name.removeprefix("lemo::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("lemo::")
    }
    assert names == EXPECTED_OPS
    assert {*lemo.ops.__all__} == EXPECTED_FUNCTIONS


def test_operators_are_called_through_one_function():
    """It turns the core's errors into Python's."""
    operators = "|".join(EXPECTED_OPS)
    found = 0
    for path in modules().values():
        text = path.read_text()
        found += len(re.findall(rf"\bcall\(\s*(?:_ops|torch\.ops\.lemo)\.(?:{operators})\b", text))
        called = re.search(rf"ops\.lemo\.\w+\(|\b_ops\.(?:{operators})(?:\.\w+)?\(", text)
        assert not called, f"{path}: {called[0]}"
    assert found >= len(EXPECTED_OPS)


def test_one_function_of_the_bindings_allocates():
    """It says what did not fit, in an error that Python knows."""
    calls = [
        (path.name, name)
        for path in sources("bindings")
        for name in re.findall(r"torch::stable::(\w+)\(", path.read_text())
    ]
    assert sorted(calls) == [("torch_tensor.cpp", "copy_"), ("torch_tensor.cpp", "new_empty")]


def test_the_fields_of_the_config_are_frozen():
    from lemo import LemoConfig
    from lemo.settings.base import fields_of

    assert {name for name, _ in fields_of(LemoConfig)} == EXPECTED_CONFIG_FIELDS


def test_lemo_reads_no_environment_variables():
    for path in sources("python", "cpp", "cuda", "bindings"):
        assert not re.search(r"os\.environ|os\.getenv|\bgetenv\(", path.read_text()), path


def test_files_and_lines_stay_short():
    folders = ("python", "cpp", "cuda", "bindings", "tests", "benchmarks", "examples")
    for path in sources(*folders):
        lines = path.read_text().splitlines()
        assert len(lines) <= 600, f"{path} has {len(lines)} lines"
        for number, line in enumerate(lines, 1):
            assert len(line) <= 100, f"{path}:{number} has {len(line)} columns"
