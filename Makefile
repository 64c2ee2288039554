# Two commands from a fresh clone: `make demo` and `make test`. Each makes its own environment in .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAINTS := -c requirements/constraints.txt
OLD_TRITON  := 3.6.0
OLD_TORCH   := 2.11.0
export MAX_JOBS ?= $(shell nproc)

# Extra pip options for torch alone, such as the index of its CPU wheels that its install page names.
TORCH_INDEX ?=

.PHONY: demo test emulation memory-check compare bench bench-all lint format types triton-check cuda-check oldest-torch-check abi-check package-check clean

demo: $(VENV)/.built
	$(BIN)/python -m pspnet_fast.demo

# As many processes as processors, of one thread each: threads that wait for each other are slow beside other work.
# A test that hangs ends its process and shows where each thread is.
PARALLEL := -n $(MAX_JOBS) --dist worksteal --benchmark-disable
HANG     := -o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true
test: $(VENV)/.built emulation
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PARALLEL) $(HANG)

# The CUDA kernels for the CPU, thread by thread: where there is no GPU, the tests run them so.
emulation: $(VENV)/.deps
	$(MAKE) -j$(MAX_JOBS) --no-print-directory -f tests/emulation/Makefile PYTHON=$(BIN)/python

# The same under AddressSanitizer: accesses out of bounds, in tensors and in shared memory.
ASAN := $(foreach name,libasan libstdc++,$(shell $(CXX) -print-file-name=$(name).so))
memory-check: $(VENV)/.built
	$(MAKE) -j$(MAX_JOBS) --no-print-directory -f tests/emulation/Makefile PYTHON=$(BIN)/python SANITIZE=address OUT=build/asan
	PSPNET_FAST_CUDA_EMULATION=$(CURDIR)/build/asan/pspnet_fast_emulated.so LD_PRELOAD="$(ASAN)" \
	ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 \
	$(BIN)/python -m pytest -q tests/test_emulation.py tests/ops -k "cuda or emulation"

# accelerate and load_checkpoint on the living libraries of requirements/compare.txt (60 MB are fetched).
compare: $(VENV)/.built build/compare/.installed
	PYTHONPATH=build/compare OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/integrations/test_live.py tests/checkpoints -k "live or smp"

# The quick set, under five minutes on two cores; bench-all takes hours there.
bench: $(VENV)/.built
	$(BIN)/python -m pytest benchmarks --benchmark-only

bench-all: $(VENV)/.built
	$(BIN)/python -m pytest benchmarks --benchmark-only --set all

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.dev
	$(BIN)/mypy pspnet_fast

# Every Triton kernel to machine code for sm_80 and sm_90, with the pinned Triton and with the oldest supported one.
triton-check: $(VENV)/.built build/triton-$(OLD_TRITON)/.installed
	$(BIN)/python .ci/triton_check.py
	PYTHONPATH=build/triton-$(OLD_TRITON) $(BIN)/python .ci/triton_check.py

# The CUDA kernels for sm_80 and sm_90: registers, no spills, and a library that loads without a GPU. nvcc is needed.
cuda-check: $(VENV)/.deps $(VENV)/.dev
	$(BIN)/python .ci/cuda_check.py
	$(BIN)/torch-abi-audit --check both build/cuda/lib/pspnet_fast/_C.abi3.so

# The same files against the headers and libraries of the oldest torch supported, whose wheel (500 MB) is fetched.
oldest-torch-check: build/torch-$(OLD_TORCH)/.fetched
	$(BIN)/python .ci/oldest_torch_check.py build/torch-$(OLD_TORCH)

# The extension needs nothing newer than torch 2.11 and Python 3.10.
abi-check: $(VENV)/.built $(VENV)/.dev
	$(BIN)/torch-abi-audit --check both pspnet_fast/_C.abi3.so
	$(BIN)/torch-abi-audit --json pspnet_fast/_C.abi3.so | grep -q '"min_torch_version": "2.11.0"'

# The wheel, the sdist, and the wheel that the sdist builds.
package-check: $(VENV)/.built $(VENV)/.dev
	$(BIN)/python .ci/package_check.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: requirements/constraints.txt | $(BIN)/python
	$(PIP) install -q --no-deps $(TORCH_INDEX) $(CONSTRAINTS) torch
	@touch $@

$(VENV)/.deps: requirements/build.txt requirements/test.txt $(VENV)/.torch
	$(PIP) install -q $(CONSTRAINTS) -r requirements/build.txt -r requirements/test.txt torch
	@touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.deps
	$(PIP) install -q $(CONSTRAINTS) -r requirements/dev.txt
	@touch $@

SOURCES := $(shell find csrc -type f) setup.py pyproject.toml
$(VENV)/.built: $(VENV)/.deps $(SOURCES)
	$(PIP) install -q --no-build-isolation --no-deps -e .
	@touch $@

build/triton-$(OLD_TRITON)/.installed: | $(BIN)/python
	$(PIP) install -q --no-deps --target build/triton-$(OLD_TRITON) triton==$(OLD_TRITON)
	@touch $@

build/compare/.installed: requirements/compare.txt | $(BIN)/python
	rm -rf build/compare
	$(PIP) install -q --no-deps --no-compile --target build/compare -r requirements/compare.txt
	@touch $@

build/torch-$(OLD_TORCH)/.fetched: | $(BIN)/python
	$(PIP) download -q --no-deps --dest build/torch-$(OLD_TORCH) torch==$(OLD_TORCH)
	@touch $@

clean:
	rm -rf build dist *.egg-info $(VENV) pspnet_fast/_C.*.so
