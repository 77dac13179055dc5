# make demo: set up .venv and run the main job.  make test: set up and pass the tests.  make help: the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ENGINE := .venv-engine
DYNAMO := build/dynamo-venv
PIP := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := $(shell find native CMakeLists.txt pyproject.toml backends compat -name '*.cpp' -o -name '*.hpp' -o -name '*.c' -o -name '*.h' -o -name '*.txt' -o -name 'pyproject.toml')

.PHONY: demo test test-core test-engine test-engine-quick test-dynamo check check-native soak mutants bench clean help

help: ## Say what there is
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/'

demo: $(VENV)/.run ## Set up and replay an hour of production requests
	bash scripts/demo.sh $(BIN)/flexkv

test: test-core test-engine-quick ## Set up and pass the tests; the slow ones on an engine are in test-engine

test-core: $(VENV)/.test ## All but a real engine
	$(BIN)/python -m pytest -q

test-engine: $(ENGINE)/.ready ## On a real vLLM (CPU build, 3.4 GB), with the slow ones
	$(ENGINE)/bin/python -m pytest -q tests/engine

test-engine-quick: $(ENGINE)/.ready ## The same without the slow ones
	$(ENGINE)/bin/python -m pytest -q -m "not slow" tests/engine

test-dynamo: $(DYNAMO)/.ready ## Set up Dynamo with vLLM's CPU build (4 GB) and run examples/dynamo
	$(DYNAMO)/bin/python -m pytest -q -s --noconftest -o pythonpath="tests/engine tests/engine_dynamo" \
	  tests/engine_dynamo/kv_routing.py tests/engine_dynamo/disaggregated.py

check: $(VENV)/.test ## Lint, format, types, import direction
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/check_imports.py

check-native: ## Native code without Python, under ThreadSanitizer, AddressSanitizer and UBSan
	bash scripts/check_native.sh

soak: $(VENV)/.test $(ENGINE)/.ready ## The long counts of kills, faults and steps
	FLEXKV_SOAK=1 bash scripts/check_native.sh
	FLEXKV_SOAK=1 $(BIN)/python -m pytest -q -s -m soak
	FLEXKV_SOAK=1 $(ENGINE)/bin/python -m pytest -q -s tests/engine

mutants: $(VENV)/.test ## Break the native index in many ways: each must turn the tests red
	$(BIN)/python tests/mutants/run.py

bench: $(VENV)/.test ## All benchmarks, figures in out/benchmarks.json
	for b in $(filter-out benchmarks/harness.py benchmarks/vllm_%,$(wildcard benchmarks/*.py)); do \
	  $(BIN)/python $$b --json out/benchmarks.json || exit 1; done

clean: ## Remove what set-up and builds have made
	rm -rf $(VENV) $(ENGINE) build out

$(VENV)/.built: $(NATIVE) requirements/build.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) install -q -r requirements/build.txt
	$(PIP) install -q --no-build-isolation -e .
	for b in backends/*/pyproject.toml compat/*/pyproject.toml; do $(PIP) install -q --no-build-isolation -e $$(dirname $$b) || exit 1; done
	touch $@

$(VENV)/.run: $(VENV)/.built requirements/run.txt
	$(PIP) install -q -r requirements/run.txt
	touch $@

$(VENV)/.test: $(VENV)/.run requirements/test.txt scripts/install_torch.sh examples/redis_backend/pyproject.toml
	$(PIP) install -q -r requirements/test.txt
	bash scripts/install_torch.sh $(BIN)/python
	$(PIP) install -q --no-build-isolation -e examples/redis_backend
	touch $@

$(ENGINE)/.ready: $(NATIVE) requirements/build.txt requirements/engine.txt scripts/install_vllm.sh
	test -x $(ENGINE)/bin/pip || $(PYTHON) -m venv --clear $(ENGINE)
	bash scripts/install_vllm.sh $(ENGINE)/bin/python
	$(ENGINE)/bin/python -m pip --disable-pip-version-check install -q -r requirements/build.txt -r requirements/engine.txt
	$(ENGINE)/bin/python -m pip --disable-pip-version-check install -q --no-build-isolation -C build-dir=build/engine -e .
	for b in backends/*/ compat/*/; do \
	  $(ENGINE)/bin/python -m pip --disable-pip-version-check install -q --no-build-isolation -e $$b || exit 1; done
	touch $@

$(DYNAMO)/.ready: $(NATIVE) requirements/build.txt scripts/install_dynamo.sh
	PYTHON=$(PYTHON) bash scripts/install_dynamo.sh $(DYNAMO)
	touch $@
