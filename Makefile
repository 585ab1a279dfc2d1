# The commands that contributors, .ci/run and .github/workflows share. `pip install -e '.[test]'` comes first.
.PHONY: lint types format test test-all coverage quickstart
PYTEST ?= pytest -n 2
OUTPUT ?= runs/quickstart-check

lint: # fails on a file that is not formatted
	ruff format --check .
	ruff check .

types:
	mypy

format: # writes
	ruff format .
	ruff check --fix .

test: # the fast tier
	$(PYTEST)

test-all:
	$(PYTEST) -m ""

# In a run of all tests on Python 3.13, coverage 7.17 missed four lines that tests of these folders run; a run of the folders alone has them.
WHOLLY_COVERED = tests/adapters tests/pruning tests/quantization tests/test_calibration.py

coverage: # the fast tier, then the bounds of .ci/coverage.py. From Python 3.12 on COVERAGE_CORE=sysmon makes it cheap
	$(PYTEST) --cov --cov-report=
	$(PYTEST) $(WHOLLY_COVERED) --cov --cov-append --cov-report=term:skip-covered --cov-report=json:coverage.json
	@python .ci/coverage.py coverage.json

quickstart: # the bounds that the README promises; OUTPUT must not exist
	python -m benchmarks.quickstart --output_dir $(OUTPUT)
