# The two commands: `make demo` and `make test`. Both make the environment themselves.
PYTHON ?= python3
BIN = .venv/bin
ARMS ?= vanilla-linear,spherical-slerp
OUT ?= runs/demo
WORKERS ?= 2

.PHONY: help setup demo test faults docs readme notebooks export data clean

help: ## show this help
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "spherical_lfm needs Python 3.10 or newer: give it with make PYTHON=...")'
	@echo "making .venv (PyTorch with CUDA: some 6 GB on disk, a few minutes)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	@touch $@

setup: .venv/.ready ## make the environment in .venv

demo: setup ## matched comparison on digits -> runs/demo (ARMS=all for the four arms)
	$(BIN)/slfm_demo --arms $(ARMS) --out $(OUT)

test: setup ## notebooks and package agree, nbdev_test on every notebook, pytest (WORKERS=2)
	$(BIN)/python scripts/check_export.py
	$(BIN)/python -m pytest tests --numprocesses $(WORKERS) --dist loadscope

faults: setup ## plant known faults one at a time and see that a test notices each (five minutes)
	$(BIN)/python scripts/plant_faults.py

docs: setup ## build the site into _docs
	$(BIN)/python scripts/build_docs.py

readme: setup ## render README.md from nbs/index.ipynb
	$(BIN)/python scripts/render_readme.py

export: setup ## write the package from the notebooks
	$(BIN)/nbdev_export

notebooks: setup ## execute all notebooks and store their outputs
	$(BIN)/python scripts/run_notebooks.py
	$(BIN)/nbdev_clean

data: setup ## retrain everything in data/ (about five hours on two cores)
	$(BIN)/python scripts/make_data.py

clean: ## remove what can be made again
	rm -rf .venv _docs _proc runs build *.egg-info
