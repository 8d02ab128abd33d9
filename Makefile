# `make demo` and `make test` need Python 3.11 or newer; all else is set up in .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
RANKS  ?= 2
# Processes of the test suite; each test starts as many ranks as it needs.
JOBS   ?= 2
# A thread for each rank: ranks share the cores.
TORCHRUN := OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone
BENCH := $(BIN)/python -m benchmarks

# The compiler that torch takes, too. Its sanitizers' runtimes must be loaded before Python is.
ifeq ($(origin CXX),default)
CXX := c++
endif
# Fresh memory is full of NaN. Python leaks by design.
POISON := detect_leaks=0:max_malloc_fill_size=268435456:malloc_fill_byte=255
SANITIZED := tests/kernels/test_native.py tests/kernels/test_native_calls.py tests/kernels/test_contract.py
RUNTIMES = $(foreach name,libasan.so libubsan.so libstdc++.so,$(shell $(CXX) -print-file-name=$(name)))

.PHONY: demo quick test test-long test-parallel test-oldest-transformers soak sanitize lint bench bench-gpu bench-exchanges bench-network bench-decode bench-train bench-bubble docs clean help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt setuptools torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev,docs]'
	touch $(READY)

demo: $(READY)  ## train a small model on real text, sharded over $(RANKS) ranks, beside one process
	$(BENCH) train --ranks $(RANKS) --out results/demo

test: $(READY)  ## the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not long' -n $(JOBS) --dist worksteal

quick: $(READY)  ## the inner loop: geometry, plans, messages, the reference kernel, a ring on ranks; under a minute
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'quick and not long' -n $(JOBS) --dist worksteal

test-long: $(READY)  ## the slow part of the test suite
	$(BIN)/python -m pytest -m long --ignore tests/parallel

test-parallel: $(READY)  ## training on every mix of axes, at 2, 4 and 8 ranks, beside one process
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long tests/parallel

# The oldest version of the extra "hf" in pyproject.toml, beside everything else that is installed.
OLDEST := .venv-oldest
SITE := import sysconfig; print(sysconfig.get_path('purelib'))
OLDEST_READY := $(OLDEST)/.ready
$(OLDEST_READY): $(READY)
	rm -rf $(OLDEST)
	$(BIN)/python -m venv $(OLDEST)
	$(BIN)/python -c "$(SITE)" > $$($(OLDEST)/bin/python -c "$(SITE)")/tested.pth
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check \
		"transformers==$$(sed -n 's/.*"transformers>=\([0-9.]*\)".*/\1/p' pyproject.toml)"
	touch $(OLDEST_READY)

# Left out: there one process counts Llama 4's chunks on across packed documents.
test-oldest-transformers: $(OLDEST_READY)  ## the Hugging Face tests that show most, under the oldest transformers supported
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -m 'not long' -k 'not (Llama4 and packed)' \
		tests/hf/test_architectures.py tests/hf/test_multimodal.py tests/hf/test_implicit_positions.py tests/hf/test_generate.py \
		tests/hf/test_trainer.py

OPERATIONS ?= 100000
soak: $(READY)  ## $(OPERATIONS) random operations on a cache over $(RANKS) ranks: values, pages, memory
	$(TORCHRUN) --nproc-per-node=$(RANKS) -m tests.cache.soak --operations $(OPERATIONS)

sanitize: $(READY)  ## the native kernel's tests, with addresses and undefined behaviour checked
	LD_PRELOAD="$(RUNTIMES)" ASAN_OPTIONS=$(POISON) PYTHONMALLOC=malloc \
		$(BIN)/python -m pytest -p tests.sanitize -s $(SANITIZED) -k native

# Prints the command that compiles a file of csrc.
COMPILE := $(BIN)/python -c "import shlex; from ringattn.kernels import build; print(shlex.join(build.compile_command()))"
# Optimisation stays on: without it, GCC leaves out the warnings that need data flow, such as -Wmaybe-uninitialized.
WARNINGS := -Wall -Wextra -Werror -S -o /dev/null

lint: $(READY)  ## ruff, mypy --strict, import rules, and the format and compiler warnings of csrc
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror csrc/cpu/*
	@if command -v $(firstword $(CXX)) > /dev/null; then \
		echo "$(CXX) $(WARNINGS) csrc/cpu/*.cpp"; \
		printf '%s\n' csrc/cpu/*.cpp | xargs -P $(JOBS) -n 1 $$($(COMPILE)) $(WARNINGS); \
	else \
		echo "csrc is not compiled: there is no C++ compiler $(firstword $(CXX))"; \
	fi

bench: $(READY)  ## speed, memory and accuracy beside one process and other libraries
	$(BENCH) attention --ranks $(RANKS)
	$(BENCH) masks --ranks $(RANKS)
	$(BENCH) memory --ranks 2 --out results/memory-2
	$(BENCH) memory --ranks 4 --out results/memory-4
	$(BENCH) memory-around
	$(BENCH) accuracy --ranks 8
	$(BENCH) kernels
	$(BENCH) kernels --lengths 8192 --kv-heads 4 --cases causal --out results/kernels-long
	$(BENCH) kernels --lengths 8192 --kv-heads 4 --cases causal window packed \
	    --dtypes float32 --head-dims 64 --out results/kernels-masks
	$(BENCH) simulated-ring
	-$(BENCH) goals results/kernels*/kernels.jsonl

bench-gpu: $(READY)  ## the contract, the sanitizer, the kernels and their goals on one GPU, in under ten minutes
	PYTHON=$(BIN)/python benchmarks/gpu.sh results/gpu

bench-exchanges: $(READY)  ## every exchange x layout x mask, in parts
	$(BENCH) exchanges --ranks $(RANKS)

# Kernels that only sleep: on few cores, real ones would compete with the network's own work.
EXCHANGES := -m benchmarks exchanges --layouts zigzag --masks causal --rounds 7
KEYS := --seq-len 4096 --idle-gflops 9
HEADS := --seq-len 2048 --idle-gflops 2.5 --heads 32 --kv-heads 32 --head-dim 16
bench-network: $(READY)  ## overlap on links of a given rate; needs root and iproute2
	$(BENCH) network --hosts 4 --rate-mbit 100 -- \
		$(EXCHANGES) $(KEYS) --exchanges ring gather-8 --out results/network/keys
	$(BENCH) network --hosts 2 --rate-mbit 100 -- \
		$(EXCHANGES) $(HEADS) --exchanges ulysses-16 --out results/network/heads
	$(BENCH) network --hosts 2 --ranks-per-host 2 --inner-mbit 1000 --rate-mbit 100 -- \
		$(EXCHANGES) $(KEYS) --exchanges ring double-ring --out results/network/two_levels

bench-decode: $(READY)  ## decoding over 4 ranks, up to 1,048,576 tokens; takes 5 GB of memory
	$(BENCH) decode --ranks 4 --tokens 8192 32768 131072 262144 524288 1048576
	$(BENCH) decode --ranks 1 --tokens 32768 --out results/decode-bf16
	$(BENCH) decode --ranks 1 --tokens 32768 --dtype float32 --out results/decode-fp32
	$(BENCH) decode --ranks 2 --tokens 8192 --merge-rounds 1000 --out results/decode-merge

bench-bubble: $(READY)  ## the bubbles of pipeline schedules beside theory, on 4 ranks that only sleep
	$(BENCH) bubble --ranks 4

bench-train: $(READY)  ## training on mixes of axes over 8 ranks: memory, and the bytes that each axis moves
	$(BENCH) mixes --ranks 8

docs: $(READY)  ## the manual, in docs/_build/html
	$(BIN)/sphinx-build -W --keep-going -q docs docs/_build/html

clean:  ## forget everything that was built
	rm -rf $(VENV) $(OLDEST) build dist docs/_build results *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
