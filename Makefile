# `make demo` runs the whole job on generated videos; `make test` runs the tests. Each makes .venv first if it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint format lock clean

demo: $(VENV)/installed
	$(BIN)/maskdp demo --out out/demo

test: $(VENV)/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(VENV)/installed
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

$(VENV)/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "maskdp needs Python 3.11 or later: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	$(BIN)/maskdp weights fetch blazepose || echo "without BlazePose's models the embedded finder is used; fetch them later: $(BIN)/maskdp weights fetch blazepose"
	touch $@

# Re-pins requirements.lock to what a fresh install of pyproject.toml resolves to; torch moves only by hand.
lock:
	rm -rf $(VENV)-lock && $(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-lock/bin/python -m pip install --quiet "$$(grep '^torch==' requirements.lock)" '.[dev]'
	$(VENV)-lock/bin/python -m pip freeze --exclude maskdp | sed 's/^\(torch==[0-9.]*\)+.*/\1/' > requirements.lock.new
	mv requirements.lock.new requirements.lock && rm -rf $(VENV)-lock

clean:
	rm -rf $(VENV) out
