#!/usr/bin/env bash
# Work on a GPU machine that got a copy of this tree, has no network, and is there for minutes only.
#
# usage: scripts/gpu_session.sh COMMAND [OPTIONS]
#
# Where the tree is built, as a machine of the same system and with a network:
#
#   pack [--for VERSION] [--module-python PYTHON] [--binaries] [--wheel NAME]...
#        [--model FOLDER] [--documents FOLDER] [--characters N]
#       Collects in build/carry what the copy lacks; copy that folder along. Always: the wheel of
#       the BLAS that the operators load, for the other machine's Python (--for, default 3.12), and
#       the one CUTLASS header that CMake looks for. Model and documents of an earlier call stay.
#       --module-python  builds lemo._C here, with this interpreter of the other machine's version
#                        (it needs Python's headers, pybind11, cmake and ninja; torch may be
#                        another interpreter's, whose package folder TORCH_DIR names)
#       --binaries       python/lemo/liblemo_ops.so and build/develop/gpu, stripped; leave it out
#                        where these files are copied themselves
#       --wheel          one more package, for example datasets, which one file of tests needs
#       --model          a causal LM, for `main-job` (about a minute of compression)
#       --documents      a folder with train.jsonl.xz and eval.jsonl.xz, for `main-job`: whole
#                        documents to train on, about N characters in all (default 10 million),
#                        and the beginnings of the held-out documents
#
# On the GPU machine, with the copy as the working folder:
#
#   setup [--device cpu]   installs the wheels into build/site, unpacks the binaries, builds lemo._C
#                          for the Python there if it has none with CUDA (no kernel is compiled),
#                          and checks that lemo runs on the GPU; half a minute. --device cpu: where
#                          there is no GPU, to try the rest.
#   python ARGUMENTS       python3 with lemo and those wheels on its path
#   test                   as `make gpu-test PREBUILT=1`
#   sanitize [FILTER]      as `make gpu-sanitize PREBUILT=1`
#   main-job [OPTIONS]     benchmarks/gpu_main_job.py on what `pack` took, 16384 tokens; about four
#                          minutes. Options go to the script and win; the figures are appended to
#                          build/gpu_main_job.jsonl.
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
    local version=3.12 module_python="" binaries="" model="" documents="" characters=10000000
    local wheels=(scipy-openblas32)
    while [ $# -gt 0 ]; do
        case $1 in
            --binaries) binaries=1; shift; continue ;;
            --for) version=${2:?} ;;
            --module-python) module_python=${2:?} ;;
            --wheel) wheels+=("${2:?}") ;;
            --model) model=${2:?} ;;
            --documents) documents=${2:?} ;;
            --characters) characters=${2:?} ;;
            *) die "pack: expected an option of the usage, got '$1'" ;;
        esac
        shift 2
    done
    rm -rf "$carry/wheels" "$carry/include" "$carry/module" "$carry/binaries.tar.xz"
    mkdir -p "$carry/include/cutlass"

    local platforms=()
    for glibc in 2014 _2_17 _2_27 _2_28 _2_34; do
        platforms+=(--platform "manylinux${glibc}_x86_64")
    done
    "$python" -m pip download -q --no-deps --only-binary=:all: --python-version "$version" \
        --implementation cp "${platforms[@]}" -d "$carry/wheels" "${wheels[@]}"
    # CMake checks for it before it knows that no kernel will be compiled.
    local cutlass
    cutlass=$("$python" -c 'import importlib.util as util
print(util.find_spec("cutlass_library").submodule_search_locations[0])')
    cp "$cutlass/source/include/cutlass/cutlass.h" "$carry/include/cutlass/"

    if [ -n "$module_python" ]; then
        build_module "$module_python" build/module > build/module.log ||
            die "lemo._C was not built: build/module.log"
        mkdir "$carry/module"
        cp build/module/_C*.so "$carry/module/"
    fi
    [ -z "$binaries" ] || pack_binaries
    if [ -n "$model" ]; then
        # Weights are bytes in pairs, of which one holds sign and exponent; the rest is noise.
        tar -C "$model" -c . | xz -T1 --lzma2=preset=6,lc=0,lp=1,pb=1 > "$carry/model.tar.xz"
    fi
    [ -z "$documents" ] || pack_documents "$documents" "$characters"
    du -ah --apparent-size "$carry" | sort -k2
}

pack_binaries() {
    local stage=build/carry_stage
    [ -f python/lemo/liblemo_ops.so ] && [ -f build/develop/gpu/lemo_gpu_tests ] ||
        die "pack --binaries: expected what 'make gpu-build' builds"
    rm -rf "$stage"
    mkdir -p "$stage/python/lemo" "$stage/build/develop/gpu"
    cp python/lemo/liblemo_ops.so "$stage/python/lemo/"
    cp build/develop/gpu/* "$stage/build/develop/gpu/"
    rm -f "$stage/build/develop/gpu/libscipy_openblas.so"  # the wheel has it
    find "$stage" -type f -exec strip {} +
    tar -C "$stage" -c . | xz -T1 -6 > "$carry/binaries.tar.xz"
    rm -rf "$stage"
}

pack_documents() {
    mkdir -p "$carry/documents"
    "$python" - "$1" "$carry/documents" "$2" << 'PYTHON'
import json, lzma, pathlib, random, sys

source, target, characters = *map(pathlib.Path, sys.argv[1:3]), int(sys.argv[3])


def lines(name):
    with lzma.open(source / name, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def write(name, documents):
    with lzma.open(target / name, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(document) + "\n" for document in documents)


train = list(lines("train.jsonl.xz"))
taken, length = [], 0
for index in random.Random(0).sample(range(len(train)), len(train)):
    if length < characters:
        taken.append(index)
        length += len(train[index]["text"])
write("train.jsonl.xz", (train[index] for index in sorted(taken)))

# Evaluations read the beginnings of held-out documents only; this many characters are twice what
# the tokenizer is asked for in a window of 32768 tokens.
beginning = 340_000
write("eval.jsonl.xz", (d | {"text": d["text"][:beginning]} for d in lines("eval.jsonl.xz")))
PYTHON
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
    [ ! -f "$carry/binaries.tar.xz" ] || tar -xJf "$carry/binaries.tar.xz"
    [ ! -d "$carry/module" ] || cp "$carry"/module/_C*.so python/lemo/
    [ -f python/lemo/liblemo_ops.so ] ||
        die "setup: expected python/lemo/liblemo_ops.so, built elsewhere; copy it, or pack it"
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
kept = lemo.ops.token_select(torch.rand(3, device=device), layout, "ratio", 0.5)
print("ready: kept blocks", kept.kept_blocks.tolist())
PYTHON
}

main_job() {
    [ -f "$carry/model.tar.xz" ] && [ -d "$carry/documents" ] ||
        die "main-job: expected what pack --model and pack --documents make, in $carry"
    mkdir -p build/model
    tar -C build/model -xJf "$carry/model.tar.xz"
    run_python benchmarks/gpu_main_job.py --model build/model \
        --train "$carry/documents/train.jsonl.xz" --eval "$carry/documents/eval.jsonl.xz" \
        --output build/gpu_main_job.jsonl --steps 40 --windows 12 --predictor-steps 100 "$@"
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
    main-job) main_job "$@" ;;
    -h | --help) usage 0 ;;
    *) usage 2 >&2 ;;
esac
