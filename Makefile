# make train     set up .venv, then train ResNet-20 on the handwritten digits (no download of data)
# make test      set up .venv, then run the unit tests: some minutes
# make test-all  run all tests, those of processes, kills and hostile files too
# make bench     measure this package beside plain Flax and, if it is installed, PyTorch (25 minutes on a CPU)
# make gpu       measure on a GPU: tests, speed beside PyTorch, Table 6, in pieces (9 minutes a call; what is finished is
#                not made again); more by GPU="--minutes 30 --against COMMIT", see python -m benchmarks.gpu --help
# make lint      ruff (check and format) and mypy
# make lock      resolve requirements.txt again from pyproject.toml

# On a machine with an NVIDIA card JAX is installed for CUDA 13 (several GB); make CUDA=no installs it for the CPU.

PYTHON ?= python3
CUDA ?= $(if $(wildcard /proc/driver/nvidia),yes,no)
REQUIREMENTS := requirements$(if $(filter yes,$(CUDA)),-cuda).txt
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

.PHONY: train test test-all bench gpu lint format lock

train: .venv/complete
	$(BIN)/python train.py configs/digits_resnet20.py

# Most programs of the unit tests run once: compiling them takes longer than they do.
test: .venv/complete
	JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(PYTEST) tests/unit

test-all: .venv/complete
	$(PYTEST) tests

bench: .venv/complete
	$(BIN)/python -m benchmarks

gpu: .venv/complete
	$(BIN)/python -m benchmarks.gpu $(GPU)

lint: .venv/complete
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/complete
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: .venv/complete
	$(BIN)/pip-compile --quiet --extra all --extra dev --unsafe-package resnet-jax --unsafe-package pip --unsafe-package setuptools --strip-extras --no-emit-index-url --no-emit-find-links --output-file requirements.txt pyproject.toml

# The stamp is written last: an interrupted installation is taken up again, a finished one never repeated.
.venv/complete: requirements.txt $(REQUIREMENTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or later is needed; name one: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement $(REQUIREMENTS)
	@touch $@
