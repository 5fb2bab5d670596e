# Two commands, each of which does all the set-up it needs:
#   make demo   fine-tune a small DINO on drawn scenes and look at what it finds
#   make test   the test suite, without what takes long: make test-slow
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
WORKERS ?= 2

.PHONY: demo test test-slow test-oldest bench bench-kernels bench-loss ablation parity lint clean
.DEFAULT_GOAL := help

help:
	@sed -n '2,3s/^#   /  /p' Makefile

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

demo: $(VENV)/installed
	$(BIN)/python -m dino_hf.tools.demo --output-dir outputs/demo

# Two workers with one thread each: faster on two cores than one worker with two threads.
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "not slow"

# Recordings of whole checkpoints, runs that are killed, several processes: each more than 20 seconds.
test-slow: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m slow

# The same suite with exactly the lower bounds of pyproject.toml, in an environment of its own.
$(OLDEST)/installed: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip uv
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST)/bin/python --resolution lowest-direct --editable '.[test]'
	@touch $@

test-oldest: $(OLDEST)/installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n $(WORKERS) --dist loadgroup

# Ratios of the deformable attention backends, and of the whole model with them.
bench-kernels: $(VENV)/installed
	$(BIN)/python -m dino_hf.tools.kernel_benchmark

# The loss against that of transformers' Deformable DETR, side by side.
bench-loss: $(VENV)/installed
	$(BIN)/python benchmarks/loss.py

# Inference, training, and what is around them, against transformers' Deformable DETR; then docs/speed.md. 15 minutes on two cores;
# BENCH=--quick shows at toy size that all of it runs, BENCH="--device cuda" measures on a GPU what can be measured there.
BENCH ?=
BENCHMARKS := loss inference training_step pipeline scaling $(if $(findstring cuda,$(BENCH)),host_syncs,image_processing coco_evaluation)

bench: $(VENV)/installed
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py $(BENCH) || exit 1; done
	$(BIN)/python benchmarks/report.py

# What DINO's three ideas bring, three seeds each; an hour and more.
ablation: $(VENV)/installed
	$(BIN)/python benchmarks/ablation.py

# How far the port is from the recordings of the three projects, in numbers.
parity: $(VENV)/installed
	PYTHONPATH=tests/parity:convert_scripts $(BIN)/python tests/parity/measure.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(OLDEST) outputs
