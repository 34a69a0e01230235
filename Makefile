# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
# Nothing is compiled when it is installed, so it has to be when it is first used.
unexport PYTHONDONTWRITEBYTECODE

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: demo test test-slow test-browser test-cluster test-faults coverage lint docs clean

demo: .venv/installed
	$(BIN)/isicdist demo

test: .venv/installed-dev lint
	$(PYTEST) -m "not slow and not cluster and not browser"

# What takes long: the network compiled by inductor, an exported ensemble, the GPU kit on a CPU, torchrun, a sweep.
test-slow: .venv/installed-dev
	$(PYTEST) -m slow

# The pages in Chromium.
test-browser: .venv/installed-dev
	@command -v chromium || command -v google-chrome || { echo "no Chromium: apt-get install chromium"; exit 1; }
	$(PYTEST) tests/browser

# Kills, cuts, full disks, flipped bits, hostile files, fuzzing, a long run: as often as the table in docs/faults.md
# says, which it prints, in half an hour. `make test` has a short form of most. Some need root, strace or nginx.
test-faults: .venv/installed-fuzz
	FAULTS=full $(PYTEST) tests/faults --timeout 1800 -m "not slow"

# Several hosts as network namespaces, a SLURM on them, and an S3 server: needs root, iproute2, nginx, and Debian's
# packages slurmctld slurmd slurm-client munge. A test for which one of them is missing is skipped, and says so.
test-cluster: .venv/installed-cluster-tests
	$(BIN)/python -m pytest tests/cluster

# `make test` with the share of lines that the tests run.
coverage: .venv/installed-dev lint
	$(PYTEST) -m "not slow and not cluster and not browser" --cov --cov-report=term:skip-covered

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/codespell
	$(BIN)/yamllint launch mkdocs.yml

docs: .venv/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf .venv demo site

# The marker is touched last, so an interrupted install is done again. One call of pip, and no .pyc files, which Python
# makes of the modules that are used: to resolve, and to compile all of torch, takes longer than the install itself.
define install
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
$(PYTHON) -m venv .venv
$(BIN)/python -m pip install -q --no-compile -c constraints.txt torch==2.13.0 -e '.$(1)'
touch $@
endef

.venv/installed: pyproject.toml constraints.txt
	$(call install)

.venv/installed-dev: pyproject.toml constraints.txt
	$(call install,[dev])
	touch .venv/installed

.venv/installed-cluster-tests: .venv/installed-dev
	$(call install,[cluster-tests])

.venv/installed-fuzz: .venv/installed-dev
	$(call install,[fuzz])
