#!/usr/bin/env bash
# usage: measure_build.sh [ARCHITECTURES]
#
# Builds the operators from nothing in build/measure, without ccache, for these architectures (as
# CMAKE_CUDA_ARCHITECTURES; default: those of a release), and prints how long it took and how large
# the library is. Uses the active environment, like `make develop`.
set -euo pipefail
cd "$(dirname "$0")/.."
options=("-DLEMO_CUDA_ARCHITECTURES=${1:-release}")

rm -rf build/measure
cmake -S . -B build/measure -G Ninja -DPython3_EXECUTABLE="$(command -v python)" -DLEMO_CUDA=ON \
    -DCCACHE_PROGRAM=CCACHE_PROGRAM-NOTFOUND "${options[@]}" > /dev/null
start=$(date +%s)
cmake --build build/measure > /dev/null
seconds=$(($(date +%s) - start))
library=build/measure/liblemo_ops.so
before=$(stat -c %s "$library")
cp "$library" build/measure/stripped.so
strip build/measure/stripped.so

echo "cores:          $(nproc), load after: $(cut -d' ' -f1 /proc/loadavg)"
echo "architectures:  $(sed -n 's/^LEMO_CUDA_ARCHITECTURES:[A-Z]*=//p' build/measure/CMakeCache.txt)"
echo "build:          $((seconds / 60)) min $((seconds % 60)) s"
echo "liblemo_ops.so: $((before / 1024)) KiB, stripped $(($(stat -c %s build/measure/stripped.so) / 1024)) KiB"
echo "slowest files, seconds:"
awk '!/^#/ { print int(($2 - $1) / 1000), $4 }' build/measure/.ninja_log | grep '\.cu\.o$' |
    sort -rn | head -8 | sed 's/CMakeFiles.lemo_cuda.dir.//; s/^/    /'
