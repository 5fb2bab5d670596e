# Two commands, each of which does all the set-up it needs:
#   make demo   fine-tune a small DINO on drawn scenes and look at what it finds
#   make test   the test suite, without what takes long: make test-slow
# Both install versions from requirements/locked.txt, with which the suite is known to pass.
PYTHON ?= python3
VENV := .venv
SCRIPTS := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
BIN := $(VENV)/$(SCRIPTS)
OLDEST := .venv-oldest
NEWEST := .venv-newest
TOOLS := .venv-tools
DOCS := .venv-docs
WORKERS ?= 2
PIP := -m pip --disable-pip-version-check install --quiet

.PHONY: help demo demo-photos data-is-named test test-slow test-oldest test-newest test-transformers docs lock bench bench-kernels bench-loss gpu-check mutants ablation parity lint clean
.DEFAULT_GOAL := help

help:
	@sed -n '2,3s/^#   /  /p' Makefile

# Each environment is made with $(PYTHON). If it is too old, the error is one sentence.
define make_environment
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: dino_hf needs Python 3.11 or newer, and \
	$(PYTHON) is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(1)
endef

$(VENV)/installed: pyproject.toml requirements/locked.txt
	$(call make_environment,$(VENV))
	$(BIN)/python $(PIP) --constraint requirements/locked.txt --editable '.[test]'
	@touch $@

# The demo needs no extras. With the extras of the tests, `bitsandbytes` would print messages.
$(VENV)/for-demo: pyproject.toml requirements/locked.txt
	$(call make_environment,$(VENV))
	$(BIN)/python $(PIP) --constraint requirements/locked.txt --editable .
	@touch $@

$(TOOLS)/installed: requirements/tools.txt
	$(call make_environment,$(TOOLS))
	$(TOOLS)/$(SCRIPTS)/python $(PIP) --requirement requirements/tools.txt
	@touch $@

$(DOCS)/installed: requirements/docs.txt
	$(call make_environment,$(DOCS))
	$(DOCS)/$(SCRIPTS)/python $(PIP) --requirement requirements/docs.txt
	@touch $@

# The documentation as a site in outputs/site. A broken link is an error.
docs: $(DOCS)/installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/$(SCRIPTS)/python -m mkdocs build --strict

# Locks versions of all dependencies in pyproject.toml, for every supported Python and system. Locked versions change only if they
# must. UPGRADE=--upgrade takes the newest versions: run `make test test-slow` before you commit them.
UPGRADE ?=

lock: $(TOOLS)/installed
	$(TOOLS)/$(SCRIPTS)/uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest --no-annotate \
		--custom-compile-command 'make lock' --extra test $(UPGRADE) pyproject.toml --output-file requirements/locked.txt

demo: $(VENV)/for-demo
	$(BIN)/python examples/demo.py --output-dir outputs/demo

# Fine-tune a small DINO on a folder of photographs: make demo-photos DATA=my-data. Its pretrained backbone is a package of 17 MB.
data-is-named:
	@test -n "$(DATA)" || { echo "error: name a data set in COCO, YOLO or Pascal VOC format: make demo-photos DATA=my-data"; exit 1; }

$(VENV)/for-demo-photos: $(VENV)/for-demo requirements/demo-photos.txt
	$(BIN)/python $(PIP) --constraint requirements/locked.txt --requirement requirements/demo-photos.txt
	@touch $@

demo-photos: data-is-named $(VENV)/for-demo-photos
	$(BIN)/python examples/demo_photos.py --data "$(DATA)" --output-dir outputs/demo-photos

# Two workers with one thread each: faster on two cores than one worker with two threads.
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "not slow"

# Tests that take more than 20 seconds each: whole checkpoints, killed runs, several processes.
test-slow: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m slow

# The same suite in a second environment, with exactly the lower bounds of pyproject.toml.
$(OLDEST)/installed: pyproject.toml $(TOOLS)/installed
	$(call make_environment,$(OLDEST))
	$(TOOLS)/$(SCRIPTS)/uv pip install --quiet --python $(OLDEST) --resolution lowest-direct --editable '.[test]'
	@touch $@

test-oldest: $(OLDEST)/installed
	OMP_NUM_THREADS=1 $(OLDEST)/$(SCRIPTS)/python -m pytest -n $(WORKERS) --dist loadgroup

# The same suite in a third environment, with the newest versions. Each call looks them up.
test-newest:
	$(call make_environment,$(NEWEST))
	$(NEWEST)/$(SCRIPTS)/python $(PIP) --upgrade --upgrade-strategy eager --editable '.[test]'
	OMP_NUM_THREADS=1 $(NEWEST)/$(SCRIPTS)/python -m pytest -n $(WORKERS) --dist loadgroup

# The common tests of transformers' own models, from its source distribution.
test-transformers: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/scripts/transformers_common_tests.py

# Speed of the deformable attention backends, and of the whole model with each.
bench-kernels: $(VENV)/installed
	$(BIN)/python benchmarks/kernel_benchmark.py

# Speed of the loss, compared with the loss of transformers' Deformable DETR.
bench-loss: $(VENV)/installed
	$(BIN)/python benchmarks/loss.py

# Speed of inference, training, data and evaluation, compared with transformers' Deformable DETR; then updates docs/speed.md.
# It takes 15 minutes on two cores. BENCH=--quick runs everything at toy size, BENCH="--device cuda" measures on a GPU.
BENCH ?=
BENCHMARKS := loss inference training_step pipeline scaling $(if $(findstring cuda,$(BENCH)),host_syncs,image_processing coco_evaluation)

bench: $(VENV)/installed
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py $(BENCH) || exit 1; done
	$(BIN)/python benchmarks/report.py

# Lists small changes of the code that no test notices, in outputs/mutants/survivors.txt: make mutants [ROOMS="data export"]
# [COUNT=40]. ROOMS are rooms, or modules such as src/dino_hf/inference/tiling.py. COUNT is the number of changes tried in each
# module. A change takes seconds, and all rooms take hours. A stopped run continues with the next call.
ROOMS :=
COUNT := 40

mutants: $(VENV)/installed $(TOOLS)/installed
	$(TOOLS)/$(SCRIPTS)/python tests/scripts/mutants.py --python $(BIN)/python --count $(COUNT) $(ROOMS)

# Check that the CUDA kernels are correct and fast on this machine's GPU. At most 8 minutes; results in outputs/gpu_check.json.
gpu-check: $(VENV)/installed
	$(BIN)/python benchmarks/gpu_check.py

# AP without each of DINO's three ideas, and with other class losses, with three seeds each. It takes hours. A stopped measurement
# continues with the next call. ABLATION="--only losses" trains a part of the variants.
ABLATION ?=

ablation: $(VENV)/installed
	$(BIN)/python benchmarks/ablation.py $(ABLATION)

# Prints the largest differences from the recordings of the other projects.
parity: $(VENV)/installed
	PYTHONPATH=tests/parity $(BIN)/python tests/parity/measure.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(TOOLS) $(DOCS) outputs
