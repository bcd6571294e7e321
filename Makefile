# `make demo` and `make test` need python3 (3.11 or newer) and make, nothing else: they set up .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-long test-deepspeed lint types checks bench bench-preferences bench-rollouts bench-plan bench-precision bench-stats wheel clean

demo: $(VENV)/.installed
	$(BIN)/posttrain stage=sft

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m "not long"

test-long: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m long

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

# DeepSpeed, where it is installed, is imported by accelerate in every process: so it has an environment of its own.
test-deepspeed: $(VENV)/.deepspeed
	$(VENV)/deepspeed/bin/python -m pytest -q tests/test_deepspeed.py

checks: lint types test test-long test-deepspeed

bench: $(VENV)/.dev
	$(BIN)/python tests/benchmarks/run.py $(BENCH)

bench-preferences: $(VENV)/.dev
	$(BIN)/python tests/benchmarks/preferences.py $(BENCH)

bench-rollouts: $(VENV)/.dev
	$(BIN)/python tests/benchmarks/rollouts.py $(BENCH)

bench-plan: $(VENV)/.dev
	$(BIN)/python tests/benchmarks/plan.py $(BENCH)

bench-precision: $(VENV)/.dev
	$(BIN)/python tests/benchmarks/precision.py $(BENCH)

bench-stats: $(VENV)/.dev
	$(BIN)/python tests/benchmarks/stats.py $(BENCH)

wheel: $(VENV)/.dev
	$(BIN)/python -m build --wheel --outdir dist .

# torch comes first, at the tested version: an unpinned one may bring gigabytes that a machine without a GPU never uses.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/.deepspeed: $(VENV)/.dev
	$(BIN)/python -m venv $(VENV)/deepspeed
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $$($(VENV)/deepspeed/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth
	$(VENV)/deepspeed/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[deepspeed]'
	touch $@

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache
