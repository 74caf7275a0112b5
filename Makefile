# make demo        train the tiny preset on INT4, evaluate, export, verify, generate, report (about 5 minutes on 2 cores)
# make test        the test suite              make test-peers   comparisons with transformers, torch, compressed-tensors
# make test-slow   what takes minutes a test: whole products of settings, programs compiled for whole clusters
# make test-gpu    the kernels on a Hopper GPU (PLATFORM=cuda13 or cuda12)
# PLATFORM=cuda13  (cuda12, tpu): the same on an accelerator. PYTHON=...: another interpreter.

PLATFORM ?= cpu
RUN ?= runs/demo
# The newest Python that starts, on the PATH or among those that pyenv and uv keep.
find = for v in $(1); do for p in python$$v $${PYENV_ROOT:-$$HOME/.pyenv}/versions/$$v*/bin/python \
  $$HOME/.local/share/uv/python/cpython-$$v*/bin/python; do "$$p" -c "" 2>/dev/null && echo "$$p" && exit; done; done
NEWEST := $(shell $(call find,3.13 3.12 3.11))
PYTHON ?= $(or $(NEWEST),python3)
# The judges run on the oldest supported Python, so that both ends of the supported jax versions are tested.
PEERS_PYTHON ?= $(or $(shell $(call find,3.11)),$(PYTHON))

VENV := .venv
READY := $(VENV)/ready-$(PLATFORM)
PEERS := .venv-peers/ready
RUN_PY := $(VENV)/bin/python launch.py

.PHONY: demo test test-peers test-oldest test-slow test-gpu lint clean-demo

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Abruzzi needs Python 3.11 or newer; name one with PYTHON=...")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test,$(PLATFORM)]'
	touch $@

$(PEERS): pyproject.toml
	test -x .venv-peers/bin/python || $(PEERS_PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test,peers]'
	touch $@

# Two runs share their first part: runs/demo goes on with the experts on the grid, runs/demo-bf16 without. The second is
# the control: what the same number of tokens gives in bf16, and what rounding that to INT4 afterwards costs.
demo: $(READY)
	@test ! -e $(RUN) || { echo "$(RUN) exists: remove it (make clean-demo) or name another with RUN=..."; exit 2; }
	$(RUN_PY) train --preset tiny --run $(RUN)
	$(RUN_PY) train --preset tiny --run $(RUN)-bf16 --quant.grid none --train.fork-from $(RUN)@grid
	$(RUN_PY) export $(RUN)
	$(RUN_PY) verify $(RUN)/export --run $(RUN)
	$(RUN_PY) eval --run $(RUN) bf16=$(RUN)-bf16:bf16 PTQ-INT4=$(RUN)-bf16:rtn QAT-INT4=$(RUN)/export
	$(RUN_PY) generate --weights $(RUN)/export
	$(RUN_PY) report $(RUN)
	@echo; echo "look at $(RUN)/report.md; ask the model: $(RUN_PY) generate --weights $(RUN)/export '3a+4b-9='"

test: $(READY)
	$(VENV)/bin/python -m pytest -n 2 -q

test-peers: $(PEERS)
	.venv-peers/bin/python -m pytest -q --override-ini addopts= -m 'not slow' tests/peers

# The whole suite again on the oldest supported Python and jax.
test-oldest: $(PEERS)
	.venv-peers/bin/python -m pytest -n 2 -q

test-slow: $(READY) $(PEERS)
	$(VENV)/bin/python -m pytest -q -m slow
	.venv-peers/bin/python -m pytest -q --override-ini addopts= -m slow tests/peers

test-gpu: $(READY)
	JAX_PLATFORMS=cuda XLA_PYTHON_CLIENT_PREALLOCATE=false $(VENV)/bin/python -m pytest -q -m gpu tests/gpu

lint: $(READY)
	$(VENV)/bin/python -m ruff check .

clean-demo:
	rm -rf $(RUN) $(RUN)-bf16
