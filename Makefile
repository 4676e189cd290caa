# make demo   sets everything up and runs the main job on the CPU
# make test   sets everything up and runs every test
# Both make a virtual environment in .venv; PYTHON and VENV choose others.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: develop
develop:  ## build the native parts into build/ and put them beside the Python sources
	cmake -S . -B build -G Ninja -DPython3_EXECUTABLE="$$(command -v python)" $(CMAKE_ARGS) > /dev/null
	cmake --build build
	cmake -E copy build/liblemo_ops.so build/_C*.so python/lemo/
