# Two commands do everything on a fresh machine: `make demo` opens the console on live guests, `make test` runs the tests.
# Wants Python 3.11 or newer (PYTHON=python3.12 to choose), gcc and make; everything else goes into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TIER ?= all
STORE ?= memfd
# Everything that pip installs, to build what is built included, is of the version that constraints.txt names.
PIP = $(BIN)/python -m pip
INSTALL := install --quiet --constraint constraints.txt --build-constraint constraints.txt
NATIVE := $(wildcard memconsole/native/*.[ch] memconsole/native/*.py memconsole/native/*.cdef memconsole/native/third_party/*)

.PHONY: demo tour sandbox tour-pictures check test coverage soak lab lab-shell deb bench lint format schema lock clean

# A venv's own pip knows no --build-constraint, and is there to be replaced.
$(VENV)/pip: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt --upgrade pip
	touch $@

# Editable, so that only native sources and dependencies ask for another install.
$(VENV)/installed: $(VENV)/pip pyproject.toml $(NATIVE)
	$(PIP) $(INSTALL) --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) $(INSTALL) --editable '.[test]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/memconsole demo

# What the tests of tests/host/test_person.py do at the console, at a pace at which one can watch; sandbox: then the keyboard is yours.
tour: $(VENV)/installed-test
	$(BIN)/python tools/tour.py

sandbox: $(VENV)/installed-test
	$(BIN)/python tools/tour.py --hand-over

# The pictures of README.md and docs/tour.md, of a host where something happens; TOUR=--check says what is stale of them.
tour-pictures: $(VENV)/installed-test
	$(BIN)/python tools/tour_pictures.py $(TOUR)

# The inner loop, under a minute: formatter, linter, types, import contracts, unit tier.
check: $(VENV)/installed-test
	$(BIN)/python tools/run_tests.py lint unit

test: $(VENV)/installed-test
	$(BIN)/python tools/run_tests.py $(TIER)

# What share of each room's lines ran: over the unit tier, and over all tiers whose processes run here (TIER=unit, the first alone).
coverage: $(VENV)/installed-test
	$(BIN)/python tools/measure_coverage.py $(TIER)

# What does not fit into an ordinary run: every fault point, twenty kexecs in a row, a minute of storm.
soak: $(VENV)/installed-test
	MEMCONSOLE_SOAK=1 $(BIN)/python -m pytest -q tests/host/test_handoff_rehearse.py tests/host/test_revoke_storm.py tests/host/test_adopted_fast.py
	MEMCONSOLE_SOAK=1 $(BIN)/python -m pytest -q tests/fleet/test_lab_hosts.py tests/fleet/test_hundred_handoffs.py
	MEMCONSOLE_SOAK=1 $(BIN)/python tools/run_tests.py vm

# The kernel of the lab: the shared one beside the checkout, else built from Debian's source, once, into ~/.cache.
lab: $(VENV)/installed-test
	$(BIN)/python tools/prepare_lab.py

# A hypervisor host in a VM, with guests that run, on this terminal: try a handoff by hand. STORE=dax: in an arena, on a kernel without handover.
lab-shell: $(VENV)/installed-test
	$(BIN)/python tools/lab_shell.py $(STORE)

# A Debian package, with what memconsole depends on inside; nothing but dpkg-deb makes it.
deb: $(VENV)/installed-test
	$(BIN)/python tools/build_deb.py

bench: $(VENV)/installed-test
	$(BIN)/python tests/bench/bench.py

lint: $(VENV)/installed-test
	$(BIN)/python tools/run_tests.py lint

format: $(VENV)/installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

schema: $(VENV)/installed
	$(BIN)/memconsole schema > docs/snapshot.schema.json
	$(BIN)/python -c 'from memconsole import glossary; print(glossary.markdown(), end="")' > docs/glossary.md
	$(BIN)/memconsole keys --markdown > docs/keys.md

# The newest versions that pyproject.toml allows; commit what the tests pass with.
lock:
	$(PYTHON) tools/lock.py

clean:
	rm -rf $(VENV) build dist *.egg-info memconsole/native/bin memconsole/native/*.so
