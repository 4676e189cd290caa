#!/usr/bin/env bash
# Test and measure on a machine with a GPU that has no network. It needs Python with torch,
# transformers, peft, safetensors and pytest, and a copy of this tree.
#
# usage: scripts/gpu_session.sh COMMAND [OPTIONS]
#
# Where there is a network, on the same system as the other machine's:
#
#   pack [--for VERSION] [--module-python PYTHON] [--wheel NAME]...
#       Collects in build/carry what pip would fetch there, for the other machine's Python (--for,
#       default 3.12): wheels of the BLAS that the operators load and of pydantic, and a CUTLASS
#       header that CMake looks for. Copy this tree with build/carry, and with what `make gpu-build`
#       has built: python/lemo/*.so and build/develop/gpu.
#       --module-python  builds lemo._C, too, with an interpreter of the other machine's version (it
#                        needs Python's headers, pybind11, cmake and ninja). Without it `setup`
#                        builds the module there, where the versions differ.
#       --wheel          one more package, for example liger-kernel, beside which `bench` measures
#
# On the other machine, in the copy:
#
#   setup [--device cpu]   installs the wheels into build/site, puts the right lemo._C in place and
#                          checks that lemo runs on the GPU. --device cpu: tries it without a GPU.
#   python ARGUMENTS       python3 with lemo and those wheels on its path
#   test                   as `make gpu-test PREBUILT=1`
#   sanitize [FILTER]      as `make gpu-sanitize PREBUILT=1`
#   bench [OPTIONS]        benchmarks/gpu_ops.py
#
# PYTHON names the interpreter (default: python3). CMAKE_ARGS are more options for CMake.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
carry=$PWD/build/carry site=$PWD/build/site

die() {
    echo "gpu_session: $*" >&2
    exit 1
}

usage() {
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
    exit "$1"
}

# build_module PYTHON FOLDER: lemo._C with CUDA, without compiling a kernel.
build_module() {
    local options=()
    [ -z "${TORCH_DIR:-}" ] || options+=("-DLEMO_TORCH_DIR=$TORCH_DIR")
    # shellcheck disable=SC2206  # a list of words
    options+=(${CMAKE_ARGS:-})
    # The interpreter's own tools first: it may have newer ones than the system.
    local PATH="$(dirname "$(command -v "$1")"):$PATH"
    command -v nvcc > /dev/null || PATH="$PATH:/usr/local/cuda/bin"
    cmake --fresh -S . -B "$2" -G Ninja -DPython3_EXECUTABLE="$(command -v "$1")" \
        -DLEMO_CUDA=ON -DLEMO_CUTLASS_INCLUDE="$carry/include" "${options[@]}"
    cmake --build "$2" --target _C
}

pack() {
    local version=3.12 module_python="" wheels=(scipy-openblas32)
    while [ $# -gt 0 ]; do
        case $1 in
            --for) version=${2:?} ;;
            --module-python) module_python=${2:?} ;;
            --wheel) wheels+=("${2:?}") ;;
            *) die "pack: expected an option of the usage, got '$1'" ;;
        esac
        shift 2
    done
    rm -rf "$carry"
    mkdir -p "$carry/include/cutlass"
    local platforms=()
    for glibc in 2014 _2_17 _2_27 _2_28 _2_34; do
        platforms+=(--platform "manylinux${glibc}_x86_64")
    done
    local download=("$python" -m pip download -q --only-binary=:all: --python-version "$version"
        --implementation cp "${platforms[@]}" -d "$carry/wheels")
    "${download[@]}" --no-deps "${wheels[@]}"
    # With what it depends on, in versions that fit.
    "${download[@]}" "pydantic>=2"
    # CMake checks for it before it knows that no kernel will be compiled.
    local cutlass
    cutlass=$(PYTHONPATH="$PWD/.venv/cutlass" "$python" -c 'import importlib.util as util
print(util.find_spec("cutlass_library").submodule_search_locations[0])')
    cp "$cutlass/source/include/cutlass/cutlass.h" "$carry/include/cutlass/"
    if [ -n "$module_python" ]; then
        build_module "$module_python" build/module > build/module.log ||
            die "lemo._C was not built: build/module.log"
        mkdir "$carry/module"
        cp build/module/_C*.so "$carry/module/"
    fi
}

run_python() {
    PYTHONPATH="$PWD/python:$site" "$python" "$@"
}

setup() {
    local device=cuda
    [ $# -eq 0 ] || [ "$1 ${2:-}" != "--device cpu" ] || device=cpu
    rm -rf "$site"
    "$python" -m pip --disable-pip-version-check install -q --no-index --no-deps --no-compile \
        --target "$site" "$carry"/wheels/*.whl
    [ ! -d "$carry/module" ] || cp "$carry"/module/_C*.so python/lemo/
    [ -f python/lemo/liblemo_ops.so ] ||
        die "setup: expected python/lemo/liblemo_ops.so, which 'make gpu-build' builds elsewhere"
    if [ -d build/develop/gpu ] && [ ! -f build/develop/gpu/libscipy_openblas.so ]; then
        cp "$site/scipy_openblas32/lib/libscipy_openblas.so" build/develop/gpu/
    fi
    if ! run_python -c 'from lemo import _C; assert _C.build_info()["cuda"]' 2> /dev/null; then
        PYTHONPATH="$site" build_module "$python" build/module
        cp build/module/_C*.so python/lemo/
    fi
    run_python - "$device" << 'PYTHON'
import sys
import torch
import lemo.ops
from lemo import _C
from lemo.packing.blocks import BlockLayout

device = sys.argv[1]
print("torch", torch.__version__, "lemo", _C.build_info())
if device == "cuda":
    assert lemo.ops.supports_device("cuda"), "lemo does not run on this machine's GPU"
    print(torch.cuda.get_device_name())
layout = BlockLayout.from_seqlens([130], 64, device)
scores = torch.rand(3, device=device)
kept = lemo.ops.token_select(scores, layout, "ratio", 0.5, keep_first=0, keep_last=1)
print("ready: kept blocks", kept.kept_blocks.tolist())
PYTHON
}

[ $# -gt 0 ] || usage 2
command=$1
shift
case $command in
    pack) pack "$@" ;;
    setup) setup "$@" ;;
    python) run_python "$@" ;;
    test)
        status=0
        build/develop/gpu/lemo_gpu_tests --gtest_brief=1 || status=1
        run_python -m pytest --device cuda tests/python "$@" || status=1
        exit $status
        ;;
    sanitize) PYTHONPATH="$site" scripts/gpu_sanitize.sh build/develop/gpu "$python" "$@" ;;
    bench) run_python benchmarks/gpu_ops.py "$@" ;;
    -h | --help) usage 0 ;;
    *) usage 2 >&2 ;;
esac
