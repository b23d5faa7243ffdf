PYTHON ?= python3
BIN := .venv/bin
# torch and everything else at versions that are known to work together; other versions in pyproject's ranges should work too.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints/tested.txt

.PHONY: demo test test-long test-slow test-libraries test-gpu bench-gpu check format autoencoder clean

demo: .venv/installed  ## train the embedded default: a tiny SDXL on pictures that the program makes
	$(BIN)/aquatint demo

test: .venv/installed-dev  ## every test that needs no GPU and no full-size model
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

test-long: .venv/installed-dev  ## whole runs and other long ones, which a change must pass too: three minutes
	$(BIN)/python -m pytest -m long -n 2 --dist worksteal -q

test-slow: .venv/installed-dev  ## full-size models: minutes, and 16 GiB of memory
	$(BIN)/python -m pytest -m slow -q

test-gpu: .venv/installed-dev
	$(BIN)/python -m pytest -m gpu -q

test-libraries: .venv/libraries  ## optimizers of torchao and bitsandbytes, which are kept out of .venv: diffusers would load them at every start
	PYTHONPATH=.venv/libraries $(BIN)/python -m pytest -m libraries -n 2 --dist worksteal -q tests/optim tests/training

.venv/libraries: .venv/installed-dev
	$(INSTALL) --no-deps --upgrade --target $@ torchao bitsandbytes
	touch $@

CALL ?= ours
ROWS ?=
RESULTS ?= benchmarks/results
bench-gpu:  ## ten minutes of benchmarks on one GPU: CALL=peers, ours, graphs, operations, optimizers or vae; ROWS=3,4 for some of them; any python with torch will do
	PYTHONPATH=src:$$PYTHONPATH $(PYTHON) -m benchmarks.gpu.run $(CALL) --results $(RESULTS) $(if $(ROWS),--rows $(ROWS))

check: .venv/installed-dev  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

autoencoder: .venv/installed  ## train the demo's autoencoder again (about half an hour)
	$(BIN)/python -m aquatint.demo.autoencoder src/aquatint/demo/assets/autoencoder.safetensors

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints/tested.txt
	$(INSTALL) --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(INSTALL) --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv
