#!/usr/bin/env bash
# usage: gpu_sanitize.sh FOLDER PYTHON [GTEST_FILTER]
#
# Runs FOLDER/lemo_gpu_tests under the four tools of compute-sanitizer, and Python tests of the ops
# under memcheck: there the bindings allocate the kernels' scratch. Every run happens; the exit
# status is 1 if one of them found anything, or did not get as far as a summary.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=$1 python=$2 filter=${3:-*}
log=$(mktemp)
failed=()

command -v compute-sanitizer > /dev/null || {
    echo "compute-sanitizer: expected on PATH; it comes with the CUDA toolkit" >&2
    exit 1
}

# check NAME TOOL OPTIONS... -- PROGRAM...
check() {
    local name=$1 tool=$2 status
    shift 2
    local options=()
    while [ "$1" != "--" ]; do
        options+=("$1")
        shift
    done
    shift
    echo "== $name"
    compute-sanitizer --tool "$tool" --error-exitcode 1 "${options[@]}" "$@" 2>&1 | tee "$log"
    status=${PIPESTATUS[0]}
    # A tool that never attached reports nothing; that is no clean run.
    if [ "$status" -ne 0 ] || ! grep -Eq 'SUMMARY: 0 (errors|hazards)' "$log"; then
        failed+=("$name")
    fi
}

# A hundred repeats tell a tool that sees every access nothing new, and take it hours.
repeats='*RepeatsAreBitEqual'
case $filter in
    *-*) selected="$filter:$repeats" ;;
    *) selected="$filter-$repeats" ;;
esac
tests=("$folder/lemo_gpu_tests" --gtest_brief=1 "--gtest_filter=$selected")
check "memcheck of the C++ tests" memcheck -- "${tests[@]}"
# All kernels, not only ours: what a library wrote counts as initialised.
check "initcheck of the C++ tests" initcheck -- "${tests[@]}"
# The kernels of the namespace lemo: races within cuBLAS are not ours to find.
check "racecheck of the C++ tests" racecheck --kernel-name kns=4lemo -- "${tests[@]}"
check "synccheck of the C++ tests" synccheck --kernel-name kns=4lemo -- "${tests[@]}"

if [ "$filter" = "*" ]; then
    # Without torch's caching, every tensor has an allocation of its own and ends where it should.
    # torch asks CUDA questions that CUDA may answer with an error; those are not kernels' errors.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=python
    files=(tests/cuda/test_*.cpp)
    files=("${files[@]/#tests\/cuda/tests/python}")
    check "memcheck of the Python tests" memcheck --report-api-errors no -- \
        "$python" -m pytest --device cuda --timeout=0 -k "low_precision or opcheck" \
        "${files[@]/%.cpp/.py}"
fi

rm -f "$log"
if [ "${#failed[@]}" -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
echo "compute-sanitizer found nothing"
