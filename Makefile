# make demo   sets everything up and runs the main job on the CPU
# make test   sets everything up and runs every test
#
# Both work on a fresh machine: they make a virtual environment in .venv (VENV=... for another one, PYTHON=... for the
# interpreter, TORCH=... for the torch to install there). `make develop` builds in place for the active environment.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# Names of CMake options, for example CMAKE_ARGS="-DLEMO_CUDA=OFF".
export CMAKE_ARGS ?=

PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
BUILD_TOOLS := "setuptools>=77" wheel "cmake>=3.25" ninja "pybind11>=2.13" scipy-openblas32
SOURCES := $(shell find cpp cuda bindings python cmake -type f -not -name '*.so' -not -path '*__pycache__*') \
	CMakeLists.txt setup.py pyproject.toml
CXX_SOURCES := $(shell find cpp tests/cpp benchmarks/cpp cmake -type f) CMakeLists.txt

.PHONY: demo test test-cpp test-python lint bench develop wheel clean help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(VENV)/.lemo  ## install lemo and run the main job on the CPU (a few minutes)
	$(VENV)/bin/lemo demo --output runs/demo

test: lint test-cpp test-python  ## install lemo and run every test

lint: $(VENV)/.lemo
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

test-cpp: build/cpp/.built  ## C++ unit tests, and one quick round of the microbenchmarks
	$(VENV)/bin/ctest --test-dir build/cpp --output-on-failure --no-tests=error

test-python: $(VENV)/.lemo  ## Python tests, against the installed package
	$(VENV)/bin/python -m pytest

bench: build/cpp/.built  ## C++ microbenchmarks
	build/cpp/lemo_bench

develop:  ## build in place for the active environment (use with PYTHONPATH=python)
	cmake -S . -B build/develop -G Ninja -DPython3_EXECUTABLE="$$(command -v python)" $(CMAKE_ARGS)
	cmake --build build/develop
	cp -f build/develop/liblemo_ops.so build/develop/_C*.so python/lemo/

wheel: $(VENV)/.tools  ## an sdist in dist/ and a wheel made of it as 'pip install' makes it
	rm -rf dist
	$(VENV)/bin/python setup.py -q sdist -d dist
	$(PIP) wheel -q --no-deps -w dist dist/lemo-*.tar.gz

clean:
	rm -rf build dist $(VENV) python/lemo/*.so

$(VENV)/.tools: pyproject.toml
	scripts/system_packages.sh $(PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q $(TORCH)
	$(PIP) install -q $(BUILD_TOOLS)
	if command -v nvcc > /dev/null; then $(PIP) install -q --no-deps nvidia-cutlass==4.2.0.0; fi
	touch $@

$(VENV)/.lemo: $(VENV)/.tools $(SOURCES)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PIP) install -q --no-build-isolation '.[test]'
	touch $@

build/cpp/.built: $(VENV)/.tools $(CXX_SOURCES)
	$(VENV)/bin/cmake -S . -B build/cpp -G Ninja -DLEMO_PYTHON=OFF -DLEMO_CUDA=OFF -DLEMO_TESTS=ON \
		-DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(VENV)/bin/ninja" -DPython3_EXECUTABLE="$(CURDIR)/$(VENV)/bin/python"
	$(VENV)/bin/cmake --build build/cpp
	touch $@
