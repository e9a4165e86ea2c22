# Every target sets up what it needs first, in .venv or one of its own; the second time that takes no time.
PYTHON ?= python3
ARGS ?=
# OpenMP threads sleep where they would spin: on a busy machine spinning makes torch on CPU many times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help demo test test-vllm soak lint types format clean

help:
	@echo "make demo    two vLLM servers share one document's KV; ARGS='--engine torch': without vLLM (--tokens 2000, ...)"
	@echo "make test    all tests                                                          (ARGS='tests/manager -x')"
	@echo "make test-vllm  the vLLM connector on real engines, on the CPU, in .venv-vllm"
	@echo "make soak    kills, stops and restarts aimed at the middle of writes (ARGS='--minutes 10 --seed 1')"
	@echo "make lint    ruff, formatting, mypy; in .venv-lint, where torch is not (make types: mypy once more, with its types)"
	@echo "make format  apply ruff's fixes and formatting"
	@echo "make clean   remove the virtual environments and caches"
	@echo "PYTHON=python3.12 chooses the interpreter; make demo uses its vLLM when it has one, and a GPU"

demo:
	@$(PYTHON) scripts/demo.py $(ARGS)

test-vllm:
	@$(PYTHON) scripts/setup_vllm.py
	.venv-vllm/bin/python -m pytest tests/vllm_connector $(ARGS)

test:
	@$(PYTHON) scripts/setup.py test
	.venv/bin/python -m pytest $(ARGS)

soak:
	@$(PYTHON) scripts/setup.py test
	.venv/bin/python scripts/soak.py $(ARGS)

lint:
	@$(PYTHON) scripts/setup.py lint
	.venv-lint/bin/python -m ruff check
	.venv-lint/bin/python -m ruff format --check
	.venv-lint/bin/python -m mypy

types:
	@$(PYTHON) scripts/setup.py test
	.venv/bin/python -m mypy --cache-dir .mypy_cache/types

format:
	@$(PYTHON) scripts/setup.py lint
	.venv-lint/bin/python -m ruff check --fix
	.venv-lint/bin/python -m ruff format

clean:
	rm -rf .venv .venv-lint .venv-vllm .venv-gpu .venv*-setup.log build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
