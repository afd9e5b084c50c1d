# Everything runs in a virtual environment of its own, made on first use.
VENV   ?= .venv
PYTHON ?= python3
# What pip takes for the build of this machine; TORCH="torch==2.13.0 --index-url ..." chooses another.
TORCH  ?= torch==2.13.0
# Or any hub id or path.
MODEL  ?= gemma-3-270m
BIN     = $(VENV)/bin

# glibc hands large blocks back to the kernel at every free, which makes training on CPUs several times slower.
export MALLOC_MMAP_THRESHOLD_ = 4294967296
export MALLOC_TRIM_THRESHOLD_ = 68719476736

.PHONY: quickstart evaluate test lint format benchmarks clean

quickstart: $(VENV)/demo     ## fine-tune, save, reload, generate
	$(BIN)/python examples/quickstart.py --model $(MODEL)

evaluate: $(VENV)/demo       ## LoRA and Bitune side by side, scored by lm-eval
	$(BIN)/python examples/evaluate.py --model $(MODEL)

test: $(VENV)/dev            ## the whole test suite
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# $(call measure,SCRIPT,FILE): a table, its JSON and its plots. OPTIONS=--resume goes on where it was stopped.
RESULTS = examples/benchmarks/results
measure = $(BIN)/python examples/benchmarks/$(1).py --models smollm2-135m gemma-3-270m --json $(RESULTS)/$(2).json $(OPTIONS)

benchmarks: $(VENV)/demo     ## every table of the README
	$(call measure,train_step,train_step) --shapes 128x64 256x128 256x64 --rounds 4
	$(call measure,train_step,train_step-checkpointing) --shapes 256x128 --rounds 4 --checkpointing --contenders lora bitune
	$(call measure,ragged,ragged) --shapes 1x8 --rounds 4
	$(call measure,lengths,lengths) --rounds 2
	$(call measure,authors,authors) --shapes 128x64 --rounds 4
	$(call measure,generate,generate) --rounds 5
	$(call measure,lm_eval,lm_eval) --rounds 2
	$(BIN)/python examples/benchmarks/report.py --write README.md

clean:
	rm -rf $(VENV) .cache build dist *.egg-info

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	touch $@

$(VENV)/demo $(VENV)/dev: $(VENV)/%: $(VENV)/torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@
