PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PACKAGES := medforget_dataset harness_tasks unlearn
# Processes that run tests, each with one thread: as many as cores, but more need memory.
TEST_JOBS ?= 2
# A file's tests share what is expensive to make. In the order of their names, since the longest files have few tests and
# would come last.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(TEST_JOBS) --dist loadfile --no-loadscope-reorder
# No command of ours needs the network once the packages are installed.
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: help setup data demo reproduce test test-slow test-browser test-wheel quality style figures bench
.DEFAULT_GOAL := help

help:
	@echo "make demo      build a small dataset, train, unlearn with four methods, evaluate, report (runs/demo/report.md)"
	@echo "make reproduce the same at full size, at all four levels, and all measures (runs/reproduce/report.html, about two hours)"
	@echo "make test      run the tests"
	@echo "make data      build the full dataset (medforget/, 3,840 rows)"
	@echo "make setup     create .venv and install everything into it"
	@echo "make test-slow run the tests that take minutes as well"
	@echo "make test-browser run the tests that click through \`medforget browse\` in Chromium"
	@echo "make test-wheel build the wheel, install it elsewhere and use it there"
	@echo "make quality   check formatting, lint and types"
	@echo "make style     mend formatting and imports"
	@echo "make bench     compare with the peers' loops and stock lm-eval (45 minutes on two idle cores)"
	@echo "make figures   draw the pictures of the documentation (needs Chromium)"

setup: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

data: $(STAMP)
	$(BIN)/medforget build --out medforget
	$(BIN)/medforget validate medforget

demo: $(STAMP)
	$(BIN)/medforget run --preset demo

reproduce: $(STAMP)
	$(BIN)/medforget run --preset reproduce

test: $(STAMP)
	$(PYTEST) -m "not slow and not gpu and not browser"

test-slow: $(STAMP)
	$(PYTEST) -m "not gpu and not browser"

# One process: each test starts a Chromium.
test-browser: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser

# The installed package, where the repository is not.
test-wheel: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_wheel.py

quality: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m harness_tasks.generate --check
	$(BIN)/python docs/commands.py --check
	$(BIN)/mypy $(PACKAGES)

figures: data demo
	$(BIN)/python docs/figures.py medforget runs/demo
	$(BIN)/python docs/screenshots.py runs/demo/medforget runs/demo

bench: $(STAMP)
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.evaluation

style: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
