# `make demo` and `make test` are all a newcomer needs; each target installs what it needs, once.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Two test processes of one thread each: faster on two cores than one process of two.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

.PHONY: demo test browser-test lint bench docs tutorials dist sbom clean
.DEFAULT_GOAL := demo

demo: .venv/.core
	$(BIN)/selfensemble demo --out runs/demo

test: .venv/.dev
	$(TEST_ENV) $(BIN)/python -m pytest -n 2

# The server's page, the report and the site in Chromium, which has to be on the PATH.
browser-test: .venv/.browser
	$(TEST_ENV) $(BIN)/python -m pytest tests/serving/test_page.py tests/test_site.py tests/report/test_report.py

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# All of CIFAR-10: from the hub, or `make bench CIFAR=FOLDER` with its parquet files. What needs a trained network
# without noise, many minutes or several processes has a command of its own: attacks, opposite_noise, scaling, soak.
CIFAR ?= uoft-cs/cifar10
bench: .venv/.bench
	for name in startup memory inference training where growth certification; do $(BIN)/python benchmarks/$$name.py --out runs/bench || exit; done
	for name in inference training; do $(BIN)/python benchmarks/$$name.py --width 0.5 --out runs/bench/half || exit; done
	for name in adaptive attack_speed serving; do $(BIN)/python benchmarks/$$name.py --data $(CIFAR) --out runs/bench || exit; done

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Executes the notebooks, and writes what they print and draw into them: a minute on one core.
tutorials: .venv/.docs
	$(BIN)/python docs/tutorials/execute.py

# Wheel and source distribution, checked, and tried in a fresh environment: the README's first code, the demo, some tests.
dist: .venv/.python
	rm -rf dist
	$(INSTALL) build twine
	$(BIN)/python -m build --quiet
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python benchmarks/installation.py dist/*.whl --whole

# What is installed, as CycloneDX, and under which licences; the tools that tell are not part of it.
sbom: .venv/.core
	$(PYTHON) -m venv .venv/tools
	.venv/tools/bin/python -m pip install --quiet --disable-pip-version-check cyclonedx-bom pip-licenses
	.venv/tools/bin/cyclonedx-py environment $(BIN)/python --output-reproducible -o sbom.cdx.json
	.venv/tools/bin/pip-licenses --python $(BIN)/python --format=markdown --output-file licences.md

clean:
	rm -rf .venv site build dist

.venv/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "selfensemble needs Python 3.11 or later: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.core: .venv/.python pyproject.toml constraints.txt
	$(INSTALL) --editable '.[cli,report,train]'
	@touch $@

.venv/.dev: .venv/.core
	$(INSTALL) --editable '.[dev]'
	@touch $@

# torchattacks pins an old version of requests that it does not need.
.venv/.bench: .venv/.core
	$(INSTALL) --editable '.[all,bench]'
	$(INSTALL) --no-deps torchattacks
	@touch $@

.venv/.browser: .venv/.dev .venv/.docs
	$(INSTALL) --editable '.[browser]'
	@touch $@

.venv/.docs: .venv/.core
	$(INSTALL) --editable '.[docs]'
	@touch $@
