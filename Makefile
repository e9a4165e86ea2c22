# Every target sets up what it needs in .venv first; the second time that takes no time.
PYTHON ?= python3
ARGS ?=

.PHONY: help demo test lint format clean

help:
	@echo "make demo    two processes with a real language model share one document's KV   (ARGS='--tokens 2000')"
	@echo "make test    all tests                                                          (ARGS='tests/manager -x')"
	@echo "make lint    ruff, formatting, mypy"
	@echo "make format  apply ruff's fixes and formatting"
	@echo "make clean   remove .venv and caches"
	@echo "PYTHON=python3.12 chooses the interpreter for .venv"

demo:
	@$(PYTHON) scripts/setup.py demo
	@.venv/bin/vcache demo $(ARGS)

test:
	@$(PYTHON) scripts/setup.py test
	.venv/bin/python -m pytest $(ARGS)

lint:
	@$(PYTHON) scripts/setup.py lint
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

format:
	@$(PYTHON) scripts/setup.py lint
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

clean:
	rm -rf .venv .venv-setup.log build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
