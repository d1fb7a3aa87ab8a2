# make setup       .venv: colossalai 0.5.0 (torch 2.5.1), the test tools, this package; nothing when up to date
# make setup-core  .venv-core: torch 2.13.0, without colossalai
# make demo        train a DLRM on real purchases through `colossalai run`; DEMO_ARGS="--steps 50" shortens it
# make test        all tests in .venv, then all but the slow ones in .venv-core; PYTEST_ARGS="-k frequency" narrows them
# make test-core   the tests in .venv-core only
# make lint        ruff: rules and format (make format applies the format)
# make bench       all benchmarks with their peers, at full size (20 GiB of RAM); BENCH_ARGS="--scale 0.05" is a trial
# make clean       remove caches and build leftovers (make distclean: the two environments as well)

PYTHON ?= python3
DEMO_ARGS ?=
PYTEST_ARGS ?=
PYTEST := -m pytest --numprocesses 2 --dist loadfile
BENCH_ARGS ?=

VENV := .venv
VENV_CORE := .venv-core
STAMP := $(VENV)/.installed
STAMP_CORE := $(VENV_CORE)/.installed
STAMP_BENCH := $(VENV)/.installed-bench

# `colossalai run` exports every variable again, unquoted, on a command line: it gets these only, and only those that are set.
# PWD is not among them; `colossalai` is found, and finds `torchrun`, by PATH.
PASS_ON := HOME TMPDIR LANG LC_ALL XDG_CACHE_HOME CUDA_VISIBLE_DEVICES LD_LIBRARY_PATH OMP_NUM_THREADS
CLEAN_ENV := env -i PATH="$(CURDIR)/$(VENV)/bin:$(PATH)" $(foreach name,$(PASS_ON),$(if $($(name)),$(name)="$($(name))"))
FREE_PORT := $(VENV)/bin/python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup setup-core demo test test-full test-core lint format bench clean distclean

help:
	@sed -n 's/^# make /make /p' Makefile

setup: $(STAMP)

setup-core: $(STAMP_CORE)

$(STAMP): requirements.txt setup.py
	$(call install,$(VENV),requirements.txt)

$(STAMP_CORE): requirements-core.txt setup.py
	$(call install,$(VENV_CORE),requirements-core.txt)

$(STAMP_BENCH): requirements-bench.txt $(STAMP)
	$(VENV)/bin/python -m pip install --requirement requirements-bench.txt
	@touch $@

# $(1): the environment, $(2): its requirements. An environment that was left half made is made anew.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, not %s: make PYTHON=python3.11 ..." % sys.version.split()[0])'
	@$(1)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(1)
	$(1)/bin/python -m pip install --requirement $(2)
	$(1)/bin/python -m pip install --no-deps --editable .
	@touch $@
endef

demo: setup
	port=$$($(FREE_PORT)) && $(CLEAN_ENV) colossalai run --nproc_per_node 1 --master_port $$port \
		examples/dlrm/train.py --config examples/dlrm/configs/purchases.py $(DEMO_ARGS) </dev/null

# .venv-core's run comes second, so that two runs never share the two or four cores of a small machine
test: test-full
	$(MAKE) --no-print-directory test-core

test-full: setup
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/python $(PYTEST) $(PYTEST_ARGS)

test-core: setup-core
	PATH="$(CURDIR)/$(VENV_CORE)/bin:$$PATH" $(VENV_CORE)/bin/python $(PYTEST) -m "not slow and not four_ranks" $(PYTEST_ARGS)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# One after the other: each alone on the machine. step and prepare come twice, the second time with torch's huge pages.
bench: $(STAMP_BENCH)
	$(VENV)/bin/python benchmarks/step.py $(BENCH_ARGS)
	$(VENV)/bin/python benchmarks/step.py --huge-pages --builds 1 $(BENCH_ARGS)
	$(VENV)/bin/python benchmarks/prepare.py $(BENCH_ARGS)
	$(VENV)/bin/python benchmarks/prepare.py --huge-pages $(BENCH_ARGS)
	$(VENV)/bin/python benchmarks/moves.py $(BENCH_ARGS)
	$(VENV)/bin/python benchmarks/start_up.py $(BENCH_ARGS)
	$(VENV)/bin/python benchmarks/scale.py $(BENCH_ARGS)
	$(VENV)/bin/python benchmarks/lookahead.py $(BENCH_ARGS)
	$(VENV)/bin/python benchmarks/end_to_end.py $(BENCH_ARGS)
	$(VENV)/bin/python benchmarks/policies.py $(BENCH_ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path './.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(VENV_CORE)
