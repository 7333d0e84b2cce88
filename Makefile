PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help compare test test-triton test-report thorough mutants contract lint clean

help:
	@echo "make compare   train small nets on real data with every method; table and plot in runs/compare"
	@echo "make test      run the tests"
	@echo "make test-triton  run the Triton kernels on the CPU, and compile them for several devices; minutes long"
	@echo "make test-report  look at reports in chromium; screenshots in runs/report"
	@echo "make thorough  run the property tests with thousands of cases, minutes long"
	@echo "make mutants   change the code in small ways and see whether a test notices, hours long"
	@echo "make contract  write docs/contract.md from the tests' markers"
	@echo "make lint      check style and types"
	@echo "make clean     remove the virtual environment"

compare: $(VENV)/ready
	$(BIN)/mbnorm compare

test: $(VENV)/ready
	$(BIN)/pytest -n auto

test-triton: $(VENV)/ready
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,triton]'
	TRITON_INTERPRET=1 $(BIN)/pytest -n auto tests/test_triton_backend.py
	$(BIN)/pytest -n auto -m triton tests/test_triton_compile.py

# installs the browser where that needs no password, and says what to install elsewhere
test-report: $(VENV)/ready
	@if ! { command -v chromium && command -v chromedriver; } > /dev/null; then \
	    if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	        apt-get -qq update && apt-get -qq install --no-install-recommends chromium chromium-driver > /dev/null; \
	    else \
	        echo "make test-report needs a browser: apt-get install chromium chromium-driver" >&2; exit 1; \
	    fi; \
	fi
	$(BIN)/pytest -m browser tests/test_report_in_browser.py

thorough: $(VENV)/ready
	$(BIN)/pytest -n auto -m thorough tests/test_properties.py

mutants: $(VENV)/ready
	$(BIN)/pip install --quiet --constraint constraints.txt 'mutmut>=3.8'
	rm -rf mutants
	$(BIN)/mutmut run --max-children 1 $(MUTANTS)

contract: $(VENV)/ready
	$(BIN)/python tests/contract.py

lint: $(VENV)/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf $(VENV)

# the constraints file keeps pip from choosing a torch by itself
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
