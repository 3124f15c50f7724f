# Two commands: `make run` answers a prompt with the built-in model, `make test` runs all that CI runs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROMPT ?= Once upon a time
TWO := -n 2 --dist worksteal  # two cores; a module's servers and models are made once, as its tests stay together

.PHONY: run test lint contract unit test-long bench clean

run: $(VENV)/.run
	$(BIN)/sagellm run "$(PROMPT)" --max-tokens 64

test: $(VENV)/.test
	$(MAKE) -j 2 --output-sync=target lint contract
	$(MAKE) unit

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

contract: $(VENV)/.test
	mkdir -p build
	$(BIN)/python -m pytest -m contract tests --cov --cov-report=json:build/contract.json
	$(BIN)/python tools/covered.py build/contract.json 90

unit: $(VENV)/.test  # what `contract` leaves
	$(BIN)/python -m pytest $(TWO) -m "not contract" tests examples

test-long: $(VENV)/.test
	$(BIN)/python -m pip install -q -e ".[ray]"
	SAGELLM_EXAMPLES=2000 $(BIN)/python -m pytest $(TWO) tests examples --ignore tests/passes/test_meaning.py
	SAGELLM_EXAMPLES=5000 $(BIN)/python -m pytest $(TWO) tests/passes/test_meaning.py  # two kinds of graphs: 10,000

bench: $(VENV)/.test
	$(BIN)/python tools/bench.py decode

$(VENV)/.run: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e .
	touch $@

$(VENV)/.test: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e ".[dev]"
	touch $@ $(VENV)/.run

clean:
	rm -rf $(VENV) build *.egg-info
