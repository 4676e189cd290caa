#!/usr/bin/env bash
# usage: check_wheel.sh WHEEL [--python PYTHON] [--torch REQUIREMENT] [--packages FOLDER] [--cuda]
#
# Installs a wheel of lemo into a fresh virtual environment, with a PATH on which there is nothing
# but that environment, and trains a small model with it: what somebody has who has no compiler.
#
# --python    the interpreter (default: python3), of the version that the wheel is for
# --torch     what pip installs (default: torch)
# --packages  takes torch and the other packages from this site-packages folder; pip installs
#             nothing but the wheel
# --cuda      the wheel has to have CUDA kernels; no GPU is needed
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

die() {
    echo "check_wheel: $*" >&2
    exit 2
}

[ $# -gt 0 ] || die "expected a wheel; see the head of this file"
wheel=$(readlink -f "$1")
[ -f "$wheel" ] || die "WHEEL: expected a file, got '$1'"
shift
python=python3 torch=torch packages="" options=()
while [ $# -gt 0 ]; do
    case $1 in
        --cuda) options+=(--cuda) && shift && continue ;;
        --python) python=$(command -v "${2:?}") ;;
        --torch) torch=${2:?} ;;
        --packages) packages=$(readlink -f "${2:?}") ;;
        *) die "expected an option of the head of this file, got '$1'" ;;
    esac
    shift 2
done

place=$(mktemp -d)
remove=$(command -v rm)
trap '"$remove" -rf "$place"' EXIT
"$python" -m venv "$place/venv"
export PATH=$place/venv/bin HOME=$place
unset PYTHONPATH PYTHONHOME LD_LIBRARY_PATH
pip=(python -m pip --disable-pip-version-check install -q --only-binary=:all:)
if [ -n "$packages" ]; then
    "${pip[@]}" --no-deps --no-index "$wheel"
    site=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "$packages" > "$site/packages.pth"
else
    "${pip[@]}" "$torch" "$wheel"
fi
cd "$place"
HF_HUB_OFFLINE=1 python "$here/check_wheel.py" "${options[@]}"
