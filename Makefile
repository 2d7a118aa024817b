PYTHON ?= .venv/bin/python

.PHONY: check format test slow fuzz

check: test
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

test:
	$(PYTHON) -m pytest

slow:
	$(PYTHON) -m pytest -m slow

fuzz:
	$(PYTHON) recipes/benchmarks/fuzz.py
