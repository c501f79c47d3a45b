PYTHON ?= python3
VENV ?= .venv
RUNS ?= 20

.PHONY: help run test quick quick-files quick-processes quick-others test-long fuzz check shuffle bench bench-peers \
	siege soak clean interop screenshots mutants

help:
	@echo "make run          serve the clock on port 6500"
	@echo "make quick        the tests that need no browser, no Redis and no packages"
	@echo "make test         all tests but the long ones and those with other people's programs"
	@echo "make check        ruff and mypy"
	@echo "make test-long    the tests that take minutes"
	@echo "make fuzz         the random tests, a hundred times as long"
	@echo "make interop      the tests with other people's clients, browsers, proxies, databases"
	@echo "make shuffle      the quick tests in random order, RUNS=20 times"
	@echo "make mutants      break the code and see whether a test notices: tools/README.md"
	@echo "make bench        costs beside a bare C loop; bench-peers: beside other servers"
	@echo "make siege        what hostile peers cost"
	@echo "make soak         an hour of restarts and rough peers"
	@echo "make screenshots  the pictures of the README"
	@echo "make clean        delete what these made"

run:
	$(PYTHON) sse_server.py --port 6500

test: $(VENV)/ready
	$(VENV)/bin/python -m pytest

QUICK = $(addprefix --ignore=tests/test_, page.py event_source.py redis.py redis_faults.py package.py documentation.py \
	interop.py bridges.py browser.py recipes.py)
# More than half of the time is waits, so three parts run at the same time: the tests of the history file, those that
# mostly start processes or wait for a time, and the others.
FILES = $(addprefix tests/test_, file_stream.py file_faults.py)
PROCESSES = $(addprefix tests/test_, terminal.py command_line.py lifecycle.py sources.py bounds.py dead_peers.py signed.py)

quick: $(VENV)/ready
	@$(MAKE) --no-print-directory -j3 quick-files quick-processes quick-others

quick-files: $(VENV)/ready
	@$(VENV)/bin/python -m pytest $(FILES)

quick-processes: $(VENV)/ready
	@$(VENV)/bin/python -m pytest $(PROCESSES)

quick-others: $(VENV)/ready
	@$(VENV)/bin/python -m pytest $(QUICK) $(addprefix --ignore=, $(FILES) $(PROCESSES))

shuffle: $(VENV)/ready
	$(VENV)/bin/python -m pip install --quiet pytest-random-order
	for run in $$(seq $(RUNS)); do \
		$(VENV)/bin/python -m pytest $(QUICK) --random-order-bucket=global || exit; \
	done

test-long: $(VENV)/ready
	$(VENV)/bin/python -m pytest -m long

fuzz: $(VENV)/ready
	$(VENV)/bin/python -m pytest -k fuzz --fuzz 100 -o faulthandler_timeout=0

mutants: $(VENV)/ready
	$(VENV)/bin/python tools/mutants.py --confirm $(MUTANTS)

check: $(VENV)/checkers
	$(VENV)/bin/ruff check sse_server.py publisher.py sse_core
	$(VENV)/bin/mypy sse_server.py publisher.py sse_core

$(VENV)/checkers: $(VENV)/ready
	$(VENV)/bin/python -m pip install --quiet ruff mypy
	touch $@

$(VENV)/ready: setup.cfg
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet pytest requests redis 'pyjwt[crypto]'
	touch $@

clean:
	rm -rf $(VENV) .venv-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache __pycache__ */__pycache__ \
		tests/interop/node_modules tests/interop/python_modules

bench: $(VENV)/ready
	$(VENV)/bin/python benchmarks/bench.py

siege:
	$(PYTHON) benchmarks/siege.py

soak:
	$(PYTHON) benchmarks/soak.py

interop: $(VENV)/ready
	$(VENV)/bin/python -m pip install --quiet psycopg -r tests/interop/requirements.txt
	$(VENV)/bin/python -m pip install --quiet --upgrade --no-deps --target tests/interop/python_modules \
		-r tests/interop/python_modules.txt
	if command -v npm >/dev/null; then npm install --prefix tests/interop \
		--no-audit --no-fund --no-package-lock --ignore-scripts --loglevel=error; fi
	$(VENV)/bin/python -m pytest -m interop

bench-peers: $(VENV)/ready
	$(VENV)/bin/python benchmarks/peers.py

screenshots: $(VENV)/ready
	$(VENV)/bin/python docs/screenshots.py
