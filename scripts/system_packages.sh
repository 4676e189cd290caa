#!/usr/bin/env bash
# Makes sure that a C++ compiler, Python's venv and headers, GoogleTest and Google Benchmark are
# here. Installs them through apt where that needs no password; otherwise says what to install.
# The first argument is the Python interpreter (default: python3).
set -euo pipefail
python=${1:-python3}

packages=()
command -v c++ > /dev/null || packages+=(g++)
command -v ccache > /dev/null || packages+=(ccache)
"$python" -c 'import ensurepip, venv' 2> /dev/null || packages+=(python3-venv)
"$python" -c 'import os, sysconfig
assert os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2> /dev/null ||
    packages+=(python3-dev)
[ -f /usr/include/gtest/gtest.h ] || packages+=(libgtest-dev)
[ -f /usr/include/benchmark/benchmark.h ] || packages+=(libbenchmark-dev)
[ ${#packages[@]} -eq 0 ] && exit 0

if command -v apt-get > /dev/null; then
    sudo=()
    [ "$(id -u)" -eq 0 ] || sudo=(sudo -n)
    if "${sudo[@]}" apt-get update -qq &&
        "${sudo[@]}" apt-get install -y -qq "${packages[@]}" > /dev/null; then
        exit 0
    fi
fi
# CMake also finds libraries in other places than /usr/include; only a missing compiler is final.
echo "missing: ${packages[*]} (Debian's names); install them with your package manager" >&2
command -v c++ > /dev/null
