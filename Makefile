# make setup   a virtual environment with all that demo and test need
# make demo    train the embedded default on handwritten digits, evaluate, name a few images, write a report
# make test    the tests, but for the long ones
# make long    the long tests: whole training steps beside the references, more cases of kernels and crashes
# make check   format, lint, types
# make docs    the site: README, docs/, notebooks/ and the API, in build/site, without a warning (mkdocs.yml)
# make soak    runs that are killed, starved and lied to: a table of what survived; half an hour (tests/soak/__main__.py)
# make fuzz    files from strangers, spoiled and hostile: a table of how reading them ends; a quarter of an hour (tests/fuzz)
# make bench   speed beside timm on this machine, in turns (benchmarks/speed.py)
# make accelerators  what the compilers of a TPU and an H100 say of our programs (benchmarks/accelerators.py)
# make lock    requirements.lock and requirements-test.lock, with hashes, by uv
# make parity  every model against its reference implementation, in float64; hours (benchmarks/parity.py)
#
# Another Python in an environment of its own: make PYTHON=python3.13 VENV=.venv313 test
# A part of the tests: make test ARGS="tests/heads -k gramian"

PYTHON ?= python3
VENV ?= .venv
UV ?= uv
JOBS ?= 2
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
DEMO := runs/quickstart

# Of `make accelerators`: an environment of its own for the compilers; GPU=1 installs CUDA's too, 5.5 GB.
AOT ?= $(VENV)-aot
GPU ?=

.PHONY: help setup lock demo test long check docs soak fuzz bench parity accelerators
help:
	@sed -n 's/^# \(make [a-z]*  .*\)/\1/p' Makefile

setup: $(VENV)/.run $(VENV)/.test

demo: $(VENV)/.run
	$(BIN)/python main.py --config=configs/quickstart.py --workdir=$(DEMO)
	$(BIN)/python -m maxmap samples configs/quickstart.py $(DEMO)/samples
	$(BIN)/python -m maxmap predict $(DEMO) $(DEMO)/samples/*.png
	$(BIN)/python -m maxmap report $(DEMO)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

long: $(VENV)/.test
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m long $(ARGS)

check: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# It fetches nothing. No --quiet, which would hide warnings from --strict; the variable silences an advertisement.
docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

soak: $(VENV)/.test
	$(BIN)/python -m tests.soak --jobs=$(JOBS) $(ARGS)

fuzz: $(VENV)/.test
	$(BIN)/python -m tests.fuzz --jobs=$(JOBS) $(ARGS)

bench: $(VENV)/.test
	$(BIN)/python -m benchmarks.speed $(ARGS)

parity: $(VENV)/.test
	$(BIN)/python -m benchmarks.parity $(ARGS)

accelerators: $(AOT)/.tpu $(if $(GPU),$(AOT)/.gpu)
	$(AOT)/bin/python -m benchmarks.accelerators $(ARGS)

# JAX's extras name the compilers of the version that requirements.txt has.
$(AOT)/.tpu: requirements.txt | $(AOT)/bin/pip
	$(AOT)/bin/python -m pip --disable-pip-version-check install --quiet -r requirements.txt 'jax[tpu]' flatbuffers
	@touch $@

$(AOT)/.gpu: requirements.txt $(AOT)/.tpu
	$(AOT)/bin/python -m pip --disable-pip-version-check install --quiet -r requirements.txt 'jax[cuda12]'
	@touch $@

# The stamps are newer than the requirements they were made from, so a second call installs nothing.
$(VENV)/.test: requirements-test.lock requirements-torch.txt $(VENV)/.run
	$(PIP) --no-deps --require-hashes -r requirements-test.lock
	$(PIP) -r requirements-torch.txt
	@touch $@

$(VENV)/.run: requirements.lock | $(BIN)/pip
	$(PIP) --no-deps --require-hashes -r requirements.lock
	@touch $@

# After a change of a requirement. Versions stay as they are in the lock where they still fit.
lock:
	$(UV) pip compile --quiet requirements.txt --output-file requirements.lock
	$(UV) pip compile --quiet requirements-test.txt --constraint requirements.lock --output-file requirements-test.lock

$(BIN)/pip $(AOT)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'maxmap needs Python 3.11 or newer: make PYTHON=/path/to/python3.12 setup' >&2; exit 1; }
	$(PYTHON) -m venv $(@:/bin/pip=)
