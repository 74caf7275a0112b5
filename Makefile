# make demo        train the tiny preset on INT4, evaluate, export, verify, generate, report (2 to 8 minutes on 2 cores)
# make demo-tools  the same for tool calls: pretrain on copying, fine-tune on chains of 1 to 8 calls, play chains of up to 300
# make test        the test suite              make test-peers   comparisons with transformers, torch, compressed-tensors
# make test-slow   what takes minutes a test: whole products of settings, programs compiled for whole clusters
# make test-gpu    the kernels on a Hopper GPU (PLATFORM=cuda13 or cuda12)      make bench-gpu     the benchmarks there
# PLATFORM=cuda13  (cuda12, tpu): the same on an accelerator. PYTHON=...: another interpreter.

PLATFORM ?= cpu
RUN ?= runs/demo
TOOLS ?= runs/tools
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

.PHONY: demo demo-tools test test-peers test-oldest test-slow test-gpu bench-gpu lint clean-demo

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

# Three runs: what pretraining has to bring along is copying, so that is all it teaches; then the fine-tuning, with the
# experts on the grid at its end, and its control without the grid. Every chain is played in a live loop.
demo-tools: $(READY)
	@test ! -e $(TOOLS) || { echo "$(TOOLS) exists: remove it (make clean-demo) or name another with TOOLS=..."; exit 2; }
	$(RUN_PY) train --preset tiny --run $(TOOLS)-base --data.task copy --data.task-length 1 3 --quant.grid none \
		--optim.schedule constant --train.steps 210 --train.batch-size 16 --train.seq-len 128
	$(RUN_PY) train --preset tiny_sft --run $(TOOLS) --train.init-from $(TOOLS)-base
	$(RUN_PY) train --preset tiny_sft --run $(TOOLS)-bf16 --quant.grid none --train.init-from None \
		--train.fork-from $(TOOLS)@grid
	$(RUN_PY) export $(TOOLS)
	$(RUN_PY) verify $(TOOLS)/export --run $(TOOLS)
	$(RUN_PY) eval --run $(TOOLS) --suite horizon --problems 64 --minutes 30 -- bf16=$(TOOLS)-bf16:bf16 \
		PTQ-RTN=$(TOOLS)-bf16:rtn PTQ-GPTQ=$(TOOLS)-bf16:gptq PTQ-AWQ=$(TOOLS)-bf16:awq QAT-INT4=$(TOOLS)/export
	$(RUN_PY) generate --weights $(TOOLS)/export --task pointer_chase --length 12 --context 768 --max-new-tokens 96
	$(RUN_PY) report $(TOOLS)

test: $(READY)
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal -q

test-peers: $(PEERS)
	.venv-peers/bin/python -m pytest -q --override-ini addopts= -m 'not slow' tests/peers

# The whole suite again on the oldest supported Python and jax.
test-oldest: $(PEERS)
	.venv-peers/bin/python -m pytest -n 2 --dist worksteal -q

test-slow: $(READY) $(PEERS)
	$(VENV)/bin/python -m pytest -q -m slow
	.venv-peers/bin/python -m pytest -q --override-ini addopts= -m slow tests/peers

test-gpu: $(READY)
	JAX_PLATFORMS=cuda XLA_PYTHON_CLIENT_PREALLOCATE=false $(VENV)/bin/python -m pytest -q -m gpu tests/gpu

# Single operations first, then whole steps: one_gpu with each part left out, and all of Moonlight, which fills an H200.
bench-gpu: $(READY)
	for what in grid_pass grouped_matmul attention newton_schulz cross_entropy "int4_roofline moonlight_16b" \
		"train_gpu --write" "train_gpu --preset moonlight_16b_h200_1 --only everything --rounds 2 --write"; do \
		JAX_PLATFORMS=cuda $(VENV)/bin/python -m bench.$$what || exit; done

lint: $(READY)
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .

clean-demo:
	rm -rf $(RUN) $(RUN)-bf16 $(TOOLS) $(TOOLS)-base $(TOOLS)-bf16
