# `make quickstart` and `make test` each do their own set-up in $(VENV); a second run starts at once.
#
#   PYTHON           interpreter of the virtual environment, 3.11 to 3.13
#   TORCH            what pip installs first on a machine without an NVIDIA GPU; where your package index offers a
#                    CPU-only build under another name or version, name it here, or point pip at it (PIP_FIND_LINKS)
#   MEGATRON         version of megatron-core, as 0.19.2; without it what pip chooses for this Python: 0.16.1 for 3.11.
#                    Give such an environment a folder of its own: make test MEGATRON=0.19.2 VENV=.venv-megatron-0.19
#   TE               version of Transformer Engine whose compiled part `make test-te` emulates: 2.11.0, and 2.20.2 with
#                    MEGATRON=0.19.2
#   TE_TESTS         what `make test-te` runs
#   TESTS            what `make test` runs, as tests/unit
#   WORKERS          processes that `make test` runs the unit tests in, and `make test-te` its files
#   TRANSFORMERS4    what `make venv-transformers4` installs beside torch, to read exports with
#   QUICKSTART_ARGS  arguments of examples/quickstart/run.py, as --smoke
#   PYTEST_ARGS      arguments of pytest, as "-k router -x"
#   REPORT_ARGS      arguments of benchmarks/train_step.py for `make gpu-report`, as "--shapes 1.8B"
#   FUZZ_RUNS        corrupt corpora that `make fuzz` makes; FUZZ_CXX names another compiler (clang++ for libFuzzer)

PYTHON ?= python3
VENV ?= .venv
VENV4 := .venv-transformers4
TORCH ?= torch==2.13.0
MEGATRON ?=
TE ?= $(if $(filter 0.19.%,$(MEGATRON)),2.20.2,2.11.0)
TE_TESTS ?= tests/te tests/gpu
TESTS ?= tests
WORKERS ?= 2
TRANSFORMERS4 ?= transformers==4.57.6
QUICKSTART_ARGS ?=
PYTEST_ARGS ?=
REPORT_ARGS ?=
FUZZ_RUNS ?= 1000000
FUZZ_CXX ?= g++

comma := ,
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help venv venv-transformers4 quickstart test test-fast test-te style check gpu-report fuzz clean

help:
	@echo "make quickstart  teach SmolLM2-135M Hungarian on this machine, four ways: train, evaluate, export (16 minutes on two cores with fast bfloat16)"
	@echo "make test-fast   run the unit tests that need neither Megatron-Core nor seconds (a minute)"
	@echo "make style       style and types: what CI looks at first"
	@echo "make check       make style and make test-fast"
	@echo "make test        run the tests"
	@echo "make test-te     run the tests that need Transformer Engine, with its compiled part emulated on the CPU"
	@echo "make gpu-report  on a machine with a GPU: run its tests, time training steps, write benchmarks/results/"
	@echo "make fuzz        feed corrupt corpora to the C++ sampler, under AddressSanitizer and UBSan"
	@echo "make venv        only install, into $(VENV)"
	@echo "make venv-transformers4  install transformers 4 into $(VENV4), for the tests that read exports with it"
	@echo "make clean       remove the environments and everything built; keeps runs/"

quickstart: $(STAMP)
	$(VENV)/bin/python examples/quickstart/run.py $(QUICKSTART_ARGS)

# Unit tests run side by side; the others start processes of their own, and some of them look at the clock.
# pytest's status 5: no test of this half was asked for.
test: $(STAMP)
ifeq ($(TESTS),tests)
	$(VENV)/bin/python -m pytest -q -n $(WORKERS) tests/unit $(PYTEST_ARGS) || [ $$? = 5 ]
	$(VENV)/bin/python -m pytest -q tests --ignore=tests/unit $(PYTEST_ARGS) || [ $$? = 5 ]
else
	$(VENV)/bin/python -m pytest -q $(TESTS) $(PYTEST_ARGS)
endif

test-fast: $(STAMP)
	$(VENV)/bin/python -m pytest -q -m fast tests/unit $(PYTEST_ARGS)

style: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m mypy

check: style test-fast

# Transformer Engine's Python alone, in a folder of its own: tests/helpers/te_on_cpu/README.md says why.
test-te: $(STAMP) .te-$(TE)/.installed
	TE_ON_CPU=.te-$(TE) $(VENV)/bin/python -m pytest -q -n $(WORKERS) --dist loadfile $(TE_TESTS) $(PYTEST_ARGS)

.te-$(TE)/.installed: | $(STAMP)
	@rm -rf $(@D)
	$(VENV)/bin/python -m pip install --no-deps --target $(@D) "transformer_engine==$(TE)" || \
	    { echo "make test-te needs the package transformer_engine $(TE), which pip could not fetch: unpack its wheel" \
	    "into $(@D) and touch $@" >&2; exit 1; }
	@touch $@

gpu-report: $(STAMP)
	$(VENV)/bin/python benchmarks/gpu_report.py $(REPORT_ARGS)

# clang++ makes a libFuzzer target, which finds its own way; any other compiler the driver with mutations of its own.
fuzz: FUZZER := $(if $(findstring clang,$(FUZZ_CXX)),fuzzer$(comma))
fuzz:
	@mkdir -p build
	$(FUZZ_CXX) -std=c++17 -O1 -g -fsanitize=$(FUZZER)address,undefined -fno-sanitize-recover=all \
	    $(if $(FUZZER),-DLIBFUZZER) -Icsrc -Itests/fuzz tests/fuzz/sampler.cpp -o build/fuzz_sampler
	build/fuzz_sampler $(if $(FUZZER),-runs=$(FUZZ_RUNS) -max_len=4096,$(FUZZ_RUNS))

venv: $(STAMP)

$(STAMP): pyproject.toml setup.py $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	    { echo "megatron-lpr needs Python 3.11, 3.12 or 3.13; name one with: make PYTHON=python3.12" >&2; exit 1; }
	@set -- $${CXX:-c++}; command -v "$$1" >/dev/null || \
	    { echo "megatron-lpr needs a C++17 compiler; install one (as g++), or name it in CXX" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	command -v nvidia-smi >/dev/null || $(VENV)/bin/python -m pip install "$(TORCH)"
	$(VENV)/bin/python -m pip install -e ".[quickstart,test]"
ifneq ($(MEGATRON),)
	@# from 0.17 on its metadata ask for Python 3.12, though its wheels for 3.11 run, and it imports triton unguarded
	$(VENV)/bin/python -m pip install --ignore-requires-python --no-deps "megatron-core==$(MEGATRON)" triton
endif
	@touch $@

# Not in $(VENV): two versions of transformers cannot be in one environment. Its tests are skipped without it.
venv-transformers4: $(VENV4)/.installed

$(VENV4)/.installed:
	$(PYTHON) -m venv $(VENV4)
	command -v nvidia-smi >/dev/null || $(VENV4)/bin/python -m pip install "$(TORCH)"
	$(VENV4)/bin/python -m pip install torch "$(TRANSFORMERS4)"
	@touch $@

clean:
	rm -rf $(VENV) $(VENV4) .venv-megatron-* .te-* build *.egg-info megatron_lpr/*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find megatron_lpr tests tools examples -name __pycache__ -prune -exec rm -rf {} +
