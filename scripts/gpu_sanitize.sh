#!/usr/bin/env bash
# usage: gpu_sanitize.sh FOLDER PYTHON [GTEST_FILTER]
#
# Runs FOLDER/lemo_gpu_tests under the four tools of compute-sanitizer, and Python tests of the ops
# under memcheck: there the bindings allocate the kernels' scratch. Every suite under every tool is
# a process of its own, JOBS of them at a time (default: the cores, 16 at most), each for LIMIT
# seconds at most (default 200). A line for each as it ends, then what failed, and what those logs
# begin and end with; all logs stay in build/sanitize. The exit status is 1 if one of them found
# anything, did not end, or did not get as far as a summary.
#
# racecheck follows every access to shared memory and takes a hundred times as long as the rest:
# of a suite with tests named Small... it runs those only, which reach every kernel.
#
# cuBLAS is replaced by tests/cuda/plain_cublas.cu, which says why; nvcc compiles it first.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=$1 python=$2 filter=${3:-*}
cores=$(nproc)
jobs=${JOBS:-$((cores < 16 ? cores : 16))} limit=${LIMIT:-200}
logs=build/sanitize

need() {
    command -v "$1" > /dev/null || PATH="$PATH:/usr/local/cuda/bin"
    command -v "$1" > /dev/null || {
        echo "$1: expected on PATH; it comes with the CUDA toolkit" >&2
        exit 1
    }
}
need compute-sanitizer
need nvcc
rm -rf "$logs"
mkdir -p "$logs/stand-in"
nvcc -shared -Xcompiler -fPIC -arch=native -lineinfo -o "$logs/stand-in/libcublas.so.13" \
    tests/cuda/plain_cublas.cu || exit 1

# A hundred repeats, or thousands of tiles, tell a tool that sees every access nothing new, and take
# it hours.
long='*RepeatsAreBitEqual:*ThanASecondDimensionOfAGrid'
case $filter in
    *-*) selected="$filter:$long" ;;
    *) selected="$filter-$long" ;;
esac

# list [PREFIX]: lines "SUITE FILTER", the tests of each suite, or those that begin with PREFIX. A
# typed suite is one for each type, and tests without a type go with those of the first.
list() {
    "$folder/lemo_gpu_tests" --gtest_list_tests --gtest_filter="$selected" |
        awk -v prefix="${1:-}" '
            /^[^ ]/ && $1 !~ /\.$/ { next }
            /^[^ ]/ {
                suite = $1
                part = substr(suite, 1, length(suite) - 1)
                if (part !~ /\//) part = part "/0"
                next
            }
            substr($1, 1, length(prefix)) == prefix { tests[part] = tests[part] ":" suite $1 }
            END { for (part in tests) print part, substr(tests[part], 2) }' | sort
}

# Each job: a name for its log, and what runs.
names=() commands=()
add() { # add NAME COMMAND...
    names+=("$1")
    shift
    commands+=("$(printf '%q ' "$@")")
}
add_suite() { # add_suite TOOL SUITE FILTER OPTIONS...
    local tool=$1 suite=$2 tests=$3
    shift 3
    add "$tool $suite" env "LD_LIBRARY_PATH=$PWD/$logs/stand-in:${LD_LIBRARY_PATH:-}" \
        compute-sanitizer --tool "$tool" --error-exitcode 1 "$@" \
        "$folder/lemo_gpu_tests" --gtest_brief=1 "--gtest_filter=$tests"
}

# The longest first. racecheck and synccheck look at the kernels of the namespace lemo.
declare -A suites small
while read -r suite tests; do suites[$suite]=$tests; done < <(list)
while read -r suite tests; do small[$suite]=$tests; done < <(list Small)
[ "${#suites[@]}" -gt 0 ] || {
    echo "no test matches '$filter'" >&2
    exit 1
}
order=$(printf '%s\n' "${!suites[@]}" | sort)
for suite in $order; do
    add_suite racecheck "$suite" "${small[$suite]:-${suites[$suite]}}" --kernel-name kns=4lemo
done
if [ "$filter" = "*" ]; then
    for file in tests/cuda/test_*.cpp tests/python/test_segment_attention_scores.py; do
        name=$(basename "${file%.*}").py
        # Without torch's caching every tensor has an allocation of its own and ends where it
        # should. torch asks CUDA questions that CUDA may answer with an error; those are not
        # kernels' errors.
        add "memcheck $name" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            "PYTHONPATH=python${PYTHONPATH:+:$PYTHONPATH}" \
            compute-sanitizer --tool memcheck --error-exitcode 1 --report-api-errors no \
            "$python" -m pytest -p no:cacheprovider --device cuda --timeout=0 \
            -k "low_precision or opcheck" "tests/python/$name"
    done
fi
for tool in initcheck memcheck synccheck; do
    for suite in $order; do
        options=()
        [ "$tool" != synccheck ] || options=(--kernel-name kns=4lemo)
        add_suite "$tool" "$suite" "${suites[$suite]}" "${options[@]}"
    done
done

# Cores are shared by the jobs: threads of the CPU's reference would spin and stop each other.
export OMP_NUM_THREADS=1
run() { # run NAME COMMAND: one line of the summary
    local log="$logs/${1//[ \/]/_}.log" start=$SECONDS status verdict
    # A group of its own, so that the limit ends the program with the tool.
    eval "timeout --kill-after=10 $limit $2" > "$log" 2>&1
    status=$?
    # A tool that never attached reports nothing; that is no clean run.
    if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then
        verdict="no end in $limit s"
    elif ! grep -q 'SUMMARY:' "$log"; then
        verdict="no summary"
    elif ! grep -Eq 'SUMMARY: 0 (errors|hazards)' "$log"; then
        verdict="findings"
    elif [ "$status" -ne 0 ]; then
        verdict="tests failed"
    else
        verdict="clean"
    fi
    printf '%4d s  %-40s %s\n' $((SECONDS - start)) "$1" "$verdict" | tee -a "$logs/summary"
}

start=$SECONDS
: > "$logs/summary"
for i in "${!names[@]}"; do
    while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n; done
    run "${names[$i]}" "${commands[$i]}" &
done
wait

total=${#names[@]} clean=$(grep -c 'clean$' "$logs/summary")
echo "== $clean of $total clean, $((SECONDS - start)) s, $jobs at a time"
[ "$clean" -lt "$total" ] || exit 0
grep -v 'clean$' "$logs/summary" | while read -r line; do
    name=$(sed -E 's/^[0-9]+ s +([^ ]+ [^ ]+) .*/\1/' <<< "$line")
    echo "== $line"
    log="$logs/${name//[ \/]/_}.log"
    # What was found first, without the host's side of it, and how it ended.
    grep '^=========' "$log" | grep -v 'Host Frame' | head -n 25
    tail -n 15 "$log"
done >&2
exit 1
