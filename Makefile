# `make demo` and `make test` do all the set-up themselves, on a fresh machine too.
PYTHON ?= python3
.DEFAULT_GOAL := demo
# Types are checked against the version for development alone.
ifdef TORCH
VENV := .venv-$(TORCH)
test: $(VENV)/.ready
else
VENV := .venv
test: lint
endif
BIN := $(VENV)/bin
export TORCHINDUCTOR_CACHE_DIR ?= $(CURDIR)/.cache/inductor
WORKERS ?= 2

.PHONY: demo test lint slow fuzz docs site bench clean

# torch is pinned for development; the package itself asks for torch>=2.11. Another one, in an environment of its own:
# make test TORCH=2.14.1 (a wheel without a +cpu build brings gigabytes of CUDA libraries).
TORCH ?= 2.13.0
$(VENV)/.ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -U pip
	$(BIN)/python -m pip install -q torch==$(TORCH)
	$(BIN)/python -m pip install -q -e '.[dev,onnx,demo]'
	touch $@

demo: $(VENV)/.ready
	$(BIN)/mpcompile demo

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test:
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -q --durations=15

slow: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -q -m 'slow and not gpu'

# Random trainings against plain torch: make fuzz SECONDS=3600 SEED=0; a script of each that fails goes to fuzz-found/.
SECONDS ?= 60
SEED ?= 0
fuzz: $(VENV)/.ready
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m fuzz.run --seconds $(SECONDS) --first $(SEED)

docs: $(VENV)/.ready
	$(BIN)/python -m mpcompile.tools.reference docs/reference

# The documentation as pages, into build/site; what is missing or broken is an error. No network once the extra is there.
$(VENV)/.site: $(VENV)/.ready
	$(BIN)/python -m pip install -q -e '.[docs]'
	touch $@

site: $(VENV)/.site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.ready
	$(BIN)/mpcompile bench

clean:
	rm -rf $(VENV) .cache build dist *.egg-info
