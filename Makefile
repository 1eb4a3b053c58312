# Two commands do everything on a fresh machine: `make demo` opens the console on live guests, `make test` runs the tests.
# Wants Python 3.11 or newer (PYTHON=python3.12 to choose), gcc and make; everything else goes into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TIER ?= all
NATIVE := $(wildcard memconsole/native/*.[ch] memconsole/native/*.py memconsole/native/*.cdef memconsole/native/third_party/*)

.PHONY: demo test soak lab lab-shell bench lint format schema clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# Editable, so that only native sources and dependencies ask for another install.
$(VENV)/installed: $(BIN)/python pyproject.toml $(NATIVE)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/memconsole demo

test: $(VENV)/installed-test
	$(BIN)/python tools/run_tests.py $(TIER)

# What does not fit into an ordinary run: every fault point, twenty kexecs in a row, a minute of storm.
soak: $(VENV)/installed-test
	MEMCONSOLE_SOAK=1 $(BIN)/python -m pytest -q tests/vm tests/host/test_handoff_rehearse.py tests/host/test_revoke_storm.py

# The kernel of the lab: the shared one beside the checkout, else built from Debian's source, once, into ~/.cache.
lab: $(VENV)/installed-test
	$(BIN)/python tools/prepare_lab.py

# A hypervisor host in a VM, with guests that run, on this terminal: try a handoff by hand.
lab-shell: $(VENV)/installed-test
	$(BIN)/python tools/lab_shell.py

bench: $(VENV)/installed-test
	$(BIN)/python tests/bench/bench.py

lint: $(VENV)/installed-test
	$(BIN)/python tools/run_tests.py lint

format: $(VENV)/installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

schema: $(VENV)/installed
	$(BIN)/memconsole schema > docs/snapshot.schema.json

clean:
	rm -rf $(VENV) build dist *.egg-info memconsole/native/bin memconsole/native/*.so
