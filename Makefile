# The four verbs, the same on a laptop and in CI. Each makes .venv first if there is none.
PYTHON ?= python3
BIN := .venv/bin
MINUTES ?= 3
KILLS ?= 200
.PHONY: demo test check fix bench gate fuzz crash clean

.venv/.installed: pyproject.toml .constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Synoptic needs Python 3.11 or newer; say: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv || { echo "On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint .constraints.txt --editable '.[dev]'
	@touch $@

demo: .venv/.installed  ## a dozen phantom patients through the real daemon and back, in a minute
	$(BIN)/synoptic demo

test: .venv/.installed  ## the whole suite
	$(BIN)/python -m pytest

check: .venv/.installed  ## lint, types, import rules, length of files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@wc -l $$(git ls-files 'worker/*.py' 'models/*.py' | grep -v migrations/versions) | awk '$$2 != "total" && $$1 > 400 { print $$2 ": " $$1 " lines; the ceiling is 400"; bad = 1 } END { exit bad }'

fix: .venv/.installed  ## format and mend what can be mended by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.installed  ## the long measurements, one JSON line each; results are quoted in deploy/README.md
	$(BIN)/python -m pip install --quiet --constraint .constraints.txt --editable '.[dev,bench]'
	$(BIN)/python -m tests.bench.line
	$(BIN)/python -m tests.bench.receive
	$(BIN)/python -m tests.bench.records
	$(BIN)/python -m tests.bench.load

gate: .venv/.installed  ## every validator, PixelMed too, on all 188 reports of the real cohort: a quarter of an hour
	JAVA_SAMPLE=188 $(BIN)/python -m pytest -s -o timeout=3000 tests/integration/test_line.py -k cohort

fuzz: .venv/.installed  ## faults put into real files for MINUTES=3, through the receiver's reader and the decoders; the result is quoted in deploy/IMAGES.md
	$(BIN)/python -m tests.fuzz $(MINUTES)

crash: .venv/.installed  ## random kill -9 of each process of the line under load, then of the receiver alone beside Orthanc's
	$(BIN)/python -m tests.crash.campaign --kills $(KILLS)

clean:
	rm -rf .venv var/demo var/demo-*
