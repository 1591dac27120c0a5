# make           lists the targets
# make reproduce the book's results from nothing, on a laptop; make test checks everything
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# which build of torch: empty = the package index's; TORCH=cu126 for GPUs before compute capability 7.5, TORCH=cpu for none
TORCH  ?=
# by content, not by date: nbdev-export touches pyproject.toml
STAMP  := $(BIN)/.env-$(shell cat requirements.lock pyproject.toml | cksum | cut -d' ' -f1)$(TORCH:%=-%)
OUT    ?= runs/laptop
SCALE  ?= laptop
# the tests compare to the last digits, which only a CPU gives twice
NO_GPU := CUDA_VISIBLE_DEVICES=
# two processes of tests share two cores, and so none of them starts more: neither threads nor workers
SHARED := OMP_NUM_THREADS=1 LOKY_MAX_CPU_COUNT=1
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONWARNINGS := ignore::SyntaxWarning

.PHONY: help env reproduce reproduce-all page test test-slow test-gpu export map clean-notebooks lint docs llms readme execute

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "cramlit needs Python 3.11 or newer: make PYTHON=python3.12 env"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==$$(sed -n 's/^torch==//p' requirements.lock)$(TORCH:%=+%) $(TORCH:%=--index-url https://download.pytorch.org/whl/%)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

env: $(STAMP)  ## create .venv with everything in it; make env TORCH=cu126 for a Titan V or V100

reproduce: env  ## raw text to table and figures at scale laptop, 20 minutes on 2 cores
	$(BIN)/cramlit reproduce --scale laptop --headline --out $(OUT)

reproduce-all: env  ## tables and figures of scale laptop but the optional ones (reference, packing, poolings, budgets): hours on 2 cores
	$(BIN)/cramlit reproduce --scale laptop --out $(OUT)

page: env  ## the committed page of a scale, from a clean commit: make page SCALE=laptop
	$(BIN)/cramlit reproduce --scale $(SCALE) --out runs/$(SCALE) --figures paper_figures/$(SCALE)

test: env  ## everything: exports, clean notebooks, lint, notebooks, the tiny pipeline, pytest
	$(BIN)/python tests/check_fresh.py
	$(MAKE) lint
	$(NO_GPU) $(SHARED) $(BIN)/nbdev-test --n-workers 2
	$(NO_GPU) $(SHARED) $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-slow: env  ## twenty kills, eight processes, two thousand steps, the rehearsal: about 15 minutes on 2 cores
	$(NO_GPU) $(BIN)/python -m pytest -q -m slow

test-gpu: env  ## the tests that need a GPU; more is measured by tests/gpu_check.py
	$(BIN)/python -m pytest -q tests/test_gpu.py

export: env  ## notebooks to package
	$(BIN)/nbdev-export

map: env  ## the map of the book at the head of every chapter
	$(BIN)/python docs/book_map.py

clean-notebooks: env  ## strip what must not be committed from the notebooks
	$(BIN)/nbdev-clean

lint: env  ## ruff on notebooks, package and tests, mypy on the package
	$(BIN)/ruff check nbs cramlit tests docs
	$(BIN)/mypy cramlit

docs: env  ## the book and its results as a site in _docs
	$(BIN)/python -m sphinx --quiet -c docs . _docs
	@echo "The site is in $(CURDIR)/_docs: open _docs/index.html in a browser, or serve it: python3 -m http.server -d _docs"

llms: env  ## llms.txt from the titles of the chapters
	$(BIN)/python docs/book.py

readme: env  ## README.md from nbs/index.ipynb
	$(BIN)/python -m nbconvert --to markdown --log-level ERROR --output ../README.md nbs/index.ipynb

execute: env  ## run every chapter and keep its outputs
	$(BIN)/python tests/execute.py nbs/*/[0-9]*.ipynb
	$(BIN)/nbdev-clean
