# The commands of this project; `make help` lists them. Plain GNU make, nothing to install first:
# each target creates .venv and installs there what it needs, and rebuilds what changed.

PYTHON ?= python3
CXX ?= g++

BIN := .venv/bin
# Absolute, so that CMake finds the same tools from every folder.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PIP := $(BIN)/python -m pip install -qq
INSTALL := $(PIP) --no-build-isolation -e

# Stamp files: the time at which a step was last done.
TOOLS := .venv/.tools
RUN := .venv/.run
TEST_TOOLS := .venv/.test-tools
TEST := .venv/.test
SASS_TOOLS := .venv/.sass-tools
PEERS := .venv-peers/.peers

BUILD := build/dev
# Folders are included, so that a deleted file is noticed too.
SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc)
PYTHON_FILES := duplex_engine python_tests .ci $(wildcard bench docs/examples)
CPP_FILES := $(shell find csrc bench -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
WITH_TESTS := -Ccmake.define.DUPLEX_TESTS=ON
CPP_TESTS := ctest --no-tests=error --output-on-failure --test-dir

# Makes a virtual environment; one without pip was begun by a Python that lacks ensurepip.
TOO_OLD := f"expected Python 3.11 or newer, found {sys.version.split()[0]}: make PYTHON=python3.12 ..."
define MAKE_VENV
@test -x $(1)/bin/pip || { \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and $(TOO_OLD))' && \
	$(PYTHON) -m venv $(1); }
endef

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: run test check bench bench-peers lint format asan asan-kernels tsan fuzz cuda-compile \
	cuda-mutants cuda-table stubs clean help

run: $(RUN) ## play a recorded scene, live, to the model that comes with the package
	@$(BIN)/duplex-engine demo

test: $(TEST) ## run all tests: C++, then Python
	@$(CPP_TESTS) $(BUILD)
	@$(BIN)/pytest

check: lint ## static checks and the fast tests
	@$(CPP_TESTS) $(BUILD)
	@$(BIN)/pytest -m "not slow"

bench: $(TEST) ## measure micro-turns, operations and encoders on this machine
	@$(BIN)/pytest bench --benchmark-columns=median,min,max,rounds

# What the other engines need lives apart: nothing of it is a dependency of this package.
bench-peers: $(TEST) $(PEERS) ## compare with other engines in one run; needs a C++ compiler and time
	@$(BIN)/python -m bench.compare_peers --shape S --out out/peers

lint: $(TEST) ## check format, types, layers, budgets and spelling; changes nothing
	@$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)
	@$(BIN)/ruff format --quiet --check $(PYTHON_FILES)
	@$(BIN)/ruff check --quiet $(PYTHON_FILES)
	@$(BIN)/mypy
	@$(BIN)/codespell
	@$(BIN)/python .ci/check_files.py
	@$(BIN)/python .ci/check_layers.py $(BUILD)
	@$(BIN)/python .ci/check_isa.py $(BUILD)
	@$(BIN)/python .ci/gpu_table.py --check
	@$(BIN)/pybind11-stubgen --exit-code -o $(BUILD)/stubs duplex_engine._core
	@diff -u duplex_engine/_core.pyi $(BUILD)/stubs/duplex_engine/_core.pyi \
		|| { echo 'the binding stub is out of date: run `make stubs`'; exit 1; }

format: $(TEST) ## rewrite the sources in the house format
	@$(BIN)/clang-format -i $(CPP_FILES)
	@$(BIN)/ruff check --quiet --fix $(PYTHON_FILES)
	@$(BIN)/ruff format --quiet $(PYTHON_FILES)

# C++ tests of their own in build/$(1), under a sanitizer. They make gcc warn about its own library, so
# warnings are no errors here.
define SANITIZED
@echo 'build: $(1)'
@cmake -G Ninja -S . -B build/$(1) -DCMAKE_BUILD_TYPE=Debug -DDUPLEX_SANITIZE=$(2) \
	-DDUPLEX_MODULE=OFF -DDUPLEX_TESTS=ON -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" >/dev/null
@ninja --quiet -C build/$(1)
endef
# Those tagged $(2), files side by side: the more threads a program has had, the slower it is.
define BY_FILE
@grep -lF '$(2)' csrc/tests/simt/*_test.cpp | xargs -n 1 basename -s .cpp | \
	xargs -P $$(nproc) -I{} build/$(1)/duplex_tests --warn NoTests -# '$(2)[#{}]'
endef

# The instrumented module takes the place of the normal one, so the stamps go first. Each process
# keeps back 16 MB of what was freed, not 256: the tests of ranks have some thirty at once.
asan: $(TEST) ## run the C++ tests and the core Python tests under AddressSanitizer and UBSan
	@echo 'build: asan'
	@rm -f $(RUN) $(TEST)
	@$(INSTALL) . -Cbuild-dir=build/asan -Ccmake.build-type=Debug \
		-Ccmake.define.DUPLEX_SANITIZE=address $(WITH_TESTS)
	@$(CPP_TESTS) build/asan
	@LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=16 $(BIN)/pytest -m core

asan-kernels: $(TEST) ## run the CUDA kernels on the host, under AddressSanitizer and UBSan
	$(call SANITIZED,asan-kernels,address)
	$(call BY_FILE,asan-kernels,[simt])

# The last one must be reported: a kernel that lacks a barrier.
tsan: $(TEST) ## run the C++ tests of threads, and of CUDA kernels, under ThreadSanitizer
	$(call SANITIZED,tsan,thread)
	@build/tsan/duplex_tests --warn NoTests "[threads]"
	$(call BY_FILE,tsan,[races])
	@build/tsan/duplex_tests "a barrier that is missing*" >build/tsan/missing.log 2>&1; \
		test $$? -eq 66 || { echo 'expected a report of the missing barrier, found none'; exit 1; }

fuzz: $(TEST) ## run the fuzz tests with many more examples
	@$(BIN)/pytest -m fuzz --hypothesis-profile=fuzz

cuda-compile: $(SASS_TOOLS) ## compile the CUDA kernels for every GPU, check registers and machine code; needs nvcc
	@$(BIN)/python .ci/check_cuda.py

cuda-mutants: $(TEST) ## damage the CUDA kernels in one place at a time: a test must notice; needs nvcc
	@$(BIN)/python .ci/cover_cuda.py $(BUILD)
	@$(BIN)/python .ci/mutate_cuda.py $(BUILD)

cuda-table: $(TEST) $(SASS_TOOLS) ## write the table of kernels in docs/GPU.md; needs nvcc
	@$(BIN)/python .ci/gpu_table.py $(BUILD)

stubs: $(TEST) ## regenerate duplex_engine/_core.pyi from the binary module
	@$(BIN)/pybind11-stubgen --exit-code -o . duplex_engine._core

clean: ## remove the builds and the virtual environment
	@rm -rf build .venv .venv-peers

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 24

$(TOOLS): pyproject.toml
	@echo 'install: build tools'
	$(call MAKE_VENV,.venv)
	@$(PIP) 'scikit-build-core>=1.1' 'pybind11>=3' 'cmake>=3.25.2' ninja
	@touch $@

$(RUN): $(TOOLS) $(SOURCES)
	@echo 'build: duplex_engine'
	@$(INSTALL) '.[plots]'
	@touch $@

# torch goes first and alone: a plain resolution could pick another build of it. Catch2's wheel
# holds only headers, so the Python version that it asks for does not matter.
$(TEST_TOOLS): $(TOOLS)
	@echo 'install: torch and Catch2'
	@$(PIP) torch==2.13.0
	@$(PIP) --ignore-requires-python --no-deps 'comma-deps-catch2>=2.13.10,<3'
	@touch $@

# Of CUDA 13.2, the oldest of use on PyPI; they read what any nvcc 13 compiled.
$(SASS_TOOLS): $(TOOLS)
	@echo 'install: cuobjdump and nvdisasm'
	@$(PIP) nvidia-cuda-cuobjdump==13.2.86 nvidia-cuda-nvdisasm==13.2.86
	@touch $@

$(PEERS): bench/peers/requirements.txt
	@echo 'install: other engines (llama.cpp is compiled, which takes minutes)'
	$(call MAKE_VENV,.venv-peers)
	@.venv-peers/bin/python -m pip install -qq -r bench/peers/requirements.txt
	@touch $@

$(TEST): $(TEST_TOOLS) $(SOURCES)
	@echo 'build: duplex_engine, its C++ tests and what the Python tests need'
	@$(INSTALL) '.[test,dev,bench]' -Cbuild-dir=$(BUILD) \
		$(WITH_TESTS) -Ccmake.define.DUPLEX_WERROR=ON
	@touch $(RUN) $@
