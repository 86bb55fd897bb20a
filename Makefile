# Commands that do everything on a machine with Python 3.11 and make: `make demo`, `make demo-drift` and `make test`.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# with one thread a busy neighbour costs its share; with a thread per core OpenMP barriers wait for it (20 times slower)
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo demo-drift test bench bench-quality crash fuzz lint lock clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[serve,train,dev]'
	touch $@

demo: setup
	$(BIN)/python -m benchmarks.demo

# months in which a new kind of fraud appears: alarm, challenger, gate, shadow, promotion, rollback
demo-drift: setup
	$(BIN)/python -m benchmarks.demo_drift

# a process per core, each with whole files: what a file sets up once stays set up once
test: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

bench: setup
	$(BIN)/python -m benchmarks

# detection quality from the public data: every fold and seed, the peers, what each part brings, the page; hours
bench-quality: setup
	$(BIN)/python -m benchmarks.quality --seeds 3
	$(BIN)/python -m benchmarks.quality.compare handbook
	$(BIN)/python -m benchmarks.quality.compare sparkov
	$(BIN)/python -m benchmarks.quality.compare simulator
	$(BIN)/python -m benchmarks.quality.order
	$(BIN)/python -m benchmarks.quality.ablation
	$(BIN)/python -m benchmarks.quality.pictures
	$(BIN)/python -m benchmarks.quality.page

# kill -9 under load, 200 times, then every answer compared with an offline run: about ten minutes
crash: setup
	$(BIN)/python -m benchmarks.crash --kills 200

# a million generated bodies at the decoder, the app and a server process: about ten minutes
fuzz: setup
	$(BIN)/python -m benchmarks.fuzz --write
	$(BIN)/python -m benchmarks.api_fuzz --examples 100

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock: setup
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//' > constraints.txt

clean:
	rm -rf $(VENV) build demo demo-drift *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
