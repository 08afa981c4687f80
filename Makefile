# All targets do the set-up that they need; a second call starts at once.

PYTHON ?= python3
VENV ?= .venv
# The version the tests were run with. The package accepts others; see pyproject.toml.
TORCH ?= torch==2.13.0
# The oldest version that the package accepts.
OLDEST_TORCH ?= torch==2.11.0

BIN := $(VENV)/bin
# Overrides for train.py: make train ARGS="trainer.max_steps=10"
ARGS ?=
# Processes that run tests; a test may start up to 8 ranks of its own. A file's tests stay together and share ranks.
JOBS ?= 2

.PHONY: train lora test test-oldest campaign gpu check format docs dist clean

train: $(VENV)/.installed-recipes
	$(BIN)/python train.py $(ARGS)

# Adapts what `make train` has trained to other text.
lora: $(VENV)/.installed-recipes
	test -d outputs/gpt-tiny/exported || \
		$(BIN)/python -m lightning_mics export outputs/gpt-tiny/checkpoints/last.ckpt outputs/gpt-tiny/exported
	$(BIN)/python train.py experiment=lora $(ARGS)

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist=loadfile $(ARGS)

# What differs between versions of torch, with the oldest one, in an environment of its own. A process that has simulated
# streams cannot fork ranks there: these files come last.
test-oldest: SIMULATED = tests/techniques/test_caches.py \
	$(addprefix tests/sharding/stream_order/test_,launches.py planted_faults.py precisions.py simulation.py usages.py)
test-oldest: PYTEST = OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest -n $(JOBS) --dist=loadfile $(ARGS)
test-oldest:
	$(MAKE) $(VENV)-oldest/.installed-dev VENV="$(VENV)-oldest" TORCH="$(OLDEST_TORCH)"
	$(PYTEST) $(filter-out $(SIMULATED),$(wildcard tests/techniques/test_*.py tests/sharding/test_*.py)) tests/_torch \
		tests/sharding/stream_order/test_fit.py tests/integrations/trainer/test_training.py \
		tests/integrations/trainer/test_once_per_step.py tests/integrations/trainer/test_windows.py \
		tests/use/test_gradients_and_flags.py tests/use/test_row_changes.py tests/use/test_unused_parameters.py
	$(PYTEST) $(SIMULATED)

# What takes too long for each change: the rest of the matrices, and the long forms of the random tests.
campaign: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist=loadfile --campaign -m campaign $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.stress.kill_while_saving --kills 100
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.stress.fuzz_checkpoints --mutations 2000
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.kill_node --kills 24

# Everything that one GPU can show; ARGS="--part memory" one part, ARGS="--device cpu" all of it small.
gpu: $(VENV)/.installed-recipes
	$(BIN)/python -m benchmarks.gpu $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, from README.md and docs/; a broken link fails (--quiet would hide it from --strict).
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Wheel and sdist, and the wheel tried in an environment of its own.
dist: $(VENV)/.installed-dist
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	PYTHON="$(PYTHON)" TORCH="$(TORCH)" .ci/try-wheel dist/*.whl

clean:
	rm -rf $(VENV) $(VENV)-oldest build dist site .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and by itself: the package's wider range then finds it there and installs no other.
$(VENV)/.installed-torch:
	@echo "Making $(VENV) with $(TORCH); once only, it takes a few minutes."
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q "$(TORCH)"
	touch $@

$(VENV)/.installed-%: pyproject.toml $(VENV)/.installed-torch
	$(BIN)/python -m pip install --disable-pip-version-check -q -e ".[$*]"
	touch $@
