# Two commands do all on a fresh machine: `make demo` and `make test`. `make quick` is for every change.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LIGHT := $(VENV)-light

.PHONY: demo quick check test test-light coverage clean

demo: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" sh examples/demo.sh

# Under two minutes: the checks, and the fast tests of what changed, the nearest first.
quick: check
	PYTHONPATH="scripts:$$PYTHONPATH" $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -p quick_deadline \
		-rs -m "not slow and not giant" $$($(BIN)/python scripts/quick_tests.py)

test: check
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Lint, formatting, the direction of imports, types.
check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# What a device needs, without torch, on any interpreter: make test-light PYTHON=python3.13
test-light:
	$(PYTHON) -m venv --clear $(LIGHT)
	$(LIGHT)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[test-light]"
	$(LIGHT)/bin/python -m pytest -n 2 --dist loadfile -m "not slow and not giant" tests/deploy tests/test_docs.py

# A figure, not a gate. The pages lie in htmlcov/.
coverage: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --cov --cov-report=term --cov-report=html

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	touch $(READY)

clean:
	rm -rf $(VENV) $(LIGHT) out build htmlcov .coverage* *.egg-info src/*.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
