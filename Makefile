# The four verbs, the same on a laptop and in CI. Each makes .venv first if there is none.
PYTHON ?= python3
BIN := .venv/bin
MINUTES ?= 3
PROCESSES ?= 3
INSTANCES ?= 10000
FILES ?= 100000
KILLS ?= 200
.PHONY: demo test browser page viewers verify check fix container runbook bench gate fuzz abuse soak restart crash verified lock sbom audit-deps clean

.venv/.installed: pyproject.toml .constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Synoptic needs Python 3.11 or newer; say: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv || { echo "On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint .constraints.txt --editable '.[dev]'
	@touch $@

demo: .venv/.installed  ## a dozen phantom patients through the real daemon and back, in a minute
	$(BIN)/synoptic demo

test: .venv/.installed  ## the whole suite, in PROCESSES=3, file by file, those that take longest first (tests/conftest.py)
	$(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder

verify: .venv/.installed  ## every fault of tests/faults.py: its tests, run, and a table of what came of them; fails where one is not proven
	$(BIN)/python -m pytest -m requirement --verify

check: .venv/.installed  ## lint, types, import rules, length of files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@wc -l $$(git ls-files 'worker/*.py' 'models/*.py' | grep -v migrations/versions) | awk '$$2 != "total" && $$1 > 400 { print $$2 ": " $$1 " lines; the ceiling is 400"; bad = 1 } END { exit bad }'
	@$(MAKE) --no-print-directory audit-deps

fix: .venv/.installed  ## format and mend what can be mended by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.installed  ## the long measurements, one JSON line each; results are quoted in deploy/README.md
	$(BIN)/python -m pip install --quiet --constraint .constraints.txt --editable '.[dev,bench]'
	$(BIN)/python -m tests.bench.line
	$(BIN)/python -m tests.bench.receive
	$(BIN)/python -m tests.bench.records
	$(BIN)/python -m tests.bench.load
	$(BIN)/python -m tests.bench.documents

gate: .venv/.installed  ## every validator, PixelMed too, on all 188 reports of the real cohort, by both databases: a quarter of an hour
	JAVA_SAMPLE=188 STEP=1 $(BIN)/python -m pytest -s tests/integration/test_line.py -k "sent or postgresql"

fuzz: .venv/.installed  ## faults put into real files for MINUTES=3, through the receiver's reader and the decoders; the result is quoted in deploy/IMAGES.md
	$(BIN)/python -m tests.fuzz $(MINUTES)

abuse: .venv/.installed  ## 200 stalled peers and worse beside one honest modality: a minute; the result is quoted in deploy/README.md
	$(BIN)/python -m tests.bench.abuse

soak: .venv/.installed  ## INSTANCES=10000 through a real installation at line rate, memory and descriptors of each process: a quarter of an hour; the result is quoted in deploy/README.md
	$(BIN)/python -m tests.bench.soak --instances $(INSTANCES) --plot var/soak.png

browser: .venv/.installed  ## the shorter half of `make page` and `make viewers`, for CI: every view of our page, and one CT in OHIF and in Orthanc's viewer; three minutes; pictures in var/page and var/viewers/screenshots
	$(BIN)/python -m pip install --quiet --constraint .constraints.txt --editable '.[dev,page]'
	$(BIN)/python -m tests.viewers.fetch
	$(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile -o timeout=600 tests/browser/page.py tests/viewers/ohif.py tests/viewers/webviewer.py -k "page.py or phantom or webviewer"

page: .venv/.installed  ## our page in Debian's Chromium (apt-get install chromium), by keyboard too, axe-core on each page; 100,000 studies in the list; look at var/page/
	$(BIN)/python -m pip install --quiet --constraint .constraints.txt --editable '.[dev,page]'
	$(BIN)/python -m pytest tests/browser/page.py
	$(BIN)/python -m tests.bench.page

viewers: .venv/.installed  ## what OHIF and Orthanc's web viewer show of each form, in Debian's Chromium (apt-get install chromium npm orthanc-webviewer): five minutes; look at var/viewers/screenshots/
	$(BIN)/python -m pip install --quiet --constraint .constraints.txt --editable '.[dev,page]'
	$(BIN)/python -m tests.viewers.fetch
	$(BIN)/python -m pytest -o timeout=600 tests/viewers/ohif.py tests/viewers/webviewer.py

container: .venv/.installed  ## the work tree by deploy/Containerfile and compose.yaml in a rootless podman (apt-get install podman podman-compose; without a registry of images, mmdebstrap): five minutes; the result is quoted in deploy/README.md
	$(BIN)/python -m pytest -s -o timeout=2400 tests/container/compose.py

runbook: .venv/.installed  ## as root: the runbook's installation of what is committed, to the letter, in a bare Debian with systemd and an Orthanc (podman, as above): six minutes; the result is quoted in deploy/README.md
	$(BIN)/python -m pytest -s -o timeout=2400 tests/container/runbook.py

restart: .venv/.installed  ## a start with FILES=100000 in the spool: ready within 30 s, the sweep behind it; the result is quoted in deploy/README.md
	SPOOL_FILES=$(FILES) $(BIN)/python -m pytest -s tests/integration/test_restart.py

crash: .venv/.installed  ## random kill -9 of each process of the line under load, then of the receiver alone beside Orthanc's
	$(BIN)/python -m tests.crash.campaign --kills $(KILLS)

# The tools of the supply chain have an environment of their own, so that they are no part of what they list.
.venv/tools/.installed: .venv/.installed
	$(PYTHON) -m venv .venv/tools
	.venv/tools/bin/python -m pip install --quiet uv==0.13.9 pip-audit==2.10.1 cyclonedx-bom==7.5.0
	@touch $@

verified:  ## before the first make: install each pinned version, but torch, from files whose sha256 is in .constraints.lock
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps --requirement .constraints.lock

lock: .venv/tools/.installed  ## the sha256 of every published file of each version in .constraints.txt but torch, which comes from several indexes
	grep -v '^torch==' .constraints.txt | .venv/tools/bin/uv pip compile - --quiet --generate-hashes --no-deps --no-header --no-annotate --python-version 3.11 -o .constraints.lock

sbom: .venv/tools/.installed  ## sbom.json: what is installed here, CycloneDX 1.6
	.venv/tools/bin/cyclonedx-py environment $(BIN)/python --sv 1.6 --of JSON -o sbom.json

audit-deps: .venv/tools/.installed  ## known vulnerabilities of the pinned versions, by pip-audit; says so where its service is not reached
	$(BIN)/python -m tests.audit .venv/tools/bin/pip-audit

clean:
	rm -rf .venv var/demo var/demo-*
