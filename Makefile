# `make` lists the verbs. Everything installs into .venv from the pinned versions in constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?= data
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup quickstart mst-demo squarehead-demo squarehead-study tune-demo test test-slow chaos soak gpu-cluster gpu bench-gpu fuzz check format bench clean

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/installed ## create .venv and install raysparse with its pinned dependencies

quickstart: $(VENV)/installed ## pre-train a GPT 75 % sparse and dense, fine-tune both, compare: under 10 minutes on 2 cores
	$(BIN)/raysparse compare configs/compare/quickstart.yaml

mst-demo: $(VENV)/installed ## pre-train the same GPT dense, static, by RigL and by MST, compare: under 15 minutes on 2 cores
	$(BIN)/raysparse compare configs/compare/mst_demo.yaml

squarehead-demo: $(VENV)/installed ## prune a GPT to 75 %, fine-tune it from data, by KL and by SquareHead, compare: under 15 minutes on 2 cores
	$(BIN)/raysparse recover configs/recover/docstrings.yaml

squarehead-study: $(VENV)/installed-dev ## that of a GPT, a T5 and a Whisper at 50, 75 and 90 %, 3 seeds each; goes on where it was; DATA=FOLDER
	$(BIN)/raysparse recover configs/recover/docstrings.yaml levels=[0.5,0.75,0.9] seeds=[0,1,2] run.name=docstrings-study \
		pretrain.set.training.length="1500 steps" teacher.set.training.length="1000 steps"  # a teacher that is done learning
	$(BIN)/raysparse recover configs/recover/tiny_translation.yaml $(foreach split,train validation,\
		teacher.set.task.data.$(split)=$(DATA)/multi30k_en_de/$(split).jsonl.gz) \
		teacher.set.task.data.test=$(DATA)/multi30k_en_de/test_2016_flickr.jsonl.gz
	$(BIN)/raysparse recover configs/recover/tiny_speech.yaml teacher.set.task.data.path=$(DATA)/speech_fsdd

tune-demo: $(VENV)/installed ## search sparsity and learning rate for the docstring task, end in a page: under 15 minutes on 2 cores
	$(BIN)/raysparse tune tuning/spaces/demo.yaml --resume

test: $(VENV)/installed-dev ## the test suite, without the slow tests
	$(BIN)/python -m pytest -m "not slow and not chaos"

test-slow: $(VENV)/installed-dev ## the slow tests: whole commands, kill and resume, torch.compile
	$(BIN)/python -m pytest -m slow

chaos: $(VENV)/installed-dev ## the faults of docs/faults.md, each against an uninterrupted run; prints their table
	$(BIN)/python -m pytest tests/chaos -m chaos

gpu-cluster: $(VENV)/installed-dev ## whether all GPUs of this machine train what one does; ends in a table (two or more GPUs)
	$(BIN)/python -m tests.gpu_cluster

gpu: $(VENV)/installed-dev ## the tests that need a GPU
	$(BIN)/python -m pytest -m gpu

bench-gpu: $(VENV)/installed-dev ## what zeros save on this GPU: one call, meant to fit 10 minutes on an H200
	$(BIN)/python -m benchmarks.gpu --out benchmarks/results

soak: $(VENV)/installed-dev ## an hour of a run that loses a worker every five minutes: is what it holds flat?
	$(BIN)/python -m benchmarks.soak --out benchmarks/results

fuzz: $(VENV)/installed-dev ## the native kernels under AddressSanitizer and UBSan, on drawn cases
	$(BIN)/python -m tests.kernels.fuzz

check: $(VENV)/installed-dev ## linter, formatter, type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --output-format min-text

format: $(VENV)/installed-dev ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed-dev ## the benchmarks of docs/benchmarks.md
	$(BIN)/python -m benchmarks.step --rounds 15 --out benchmarks/results
	$(BIN)/python -m benchmarks.masks --out benchmarks/results
	$(BIN)/python -m benchmarks.topology --out benchmarks/results
	$(BIN)/python -m benchmarks.checkpoint --out benchmarks/results
	$(BIN)/python -m benchmarks.distillation --out benchmarks/results
	$(BIN)/python -m benchmarks.startup --runs 5 --out benchmarks/results
	$(BIN)/python -m benchmarks.cpu_kernels --out benchmarks/results
	$(BIN)/python -m benchmarks.cpu_step --out benchmarks/results
	$(BIN)/python -m benchmarks.attention --out benchmarks/results
	$(BIN)/python -m benchmarks.decode --threads 2 --out benchmarks/results
	$(BIN)/python -m benchmarks.answers --out benchmarks/results
	$(BIN)/python -m benchmarks.tune --out benchmarks/results
	$(BIN)/python -m benchmarks.wire --rounds 3 --whole-model --out benchmarks/results  # as root

clean: ## remove .venv and build leftovers; runs/ stays
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Expected Python 3.11 or newer. Got $$($(PYTHON) --version). Use: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first and alone: a build for this machine that is already to be had is not replaced by another
$(VENV)/installed: $(VENV)/bin/python pyproject.toml setup.py constraints.txt $(wildcard raysparse/kernels/native/*)
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) -c constraints.txt -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) -c constraints.txt -e '.[audio,dev,fairscale,int8,metrics,tune]'
	touch $@
