# Everything a newcomer needs: `make demo` trains, resumes, distils and evaluates; `make test` runs the tests.
PYTHON ?= python3.11
BIN := .venv/bin
# A test waits more than it computes (processes start, ranks meet): three at once keep two cores busy.
TEST_PROCESSES ?= 3
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder
LAUNCH := OMP_NUM_THREADS=1 $(BIN)/accelerate launch --config_file accelerate_configs/multi_cpu.yaml

SHELL_FILES := .ci/run tests/cluster/mini_slurm.sh

.PHONY: setup demo test test-slow check format clean

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Two real ranks on the CPU. The teacher's first attempt stops halfway on purpose; the second one goes on where it was.
# Then a student learns from its soft targets, and both stand side by side.
demo: setup
	rm -rf demo
	$(BIN)/signscale synth --layout features --out demo/corpus --clips 256 --seed 7
	$(LAUNCH) -m trainer.train --config configs/demo.yaml --stop_after_steps 200
	$(LAUNCH) -m trainer.train --config configs/demo.yaml --resume auto
	$(LAUNCH) -m trainer.evaluate --checkpoint demo/run --split dev --max_wer 10
	$(LAUNCH) -m trainer.evaluate --checkpoint demo/run --split test
	$(LAUNCH) -m trainer.extract --checkpoint demo/run --split train
	$(LAUNCH) -m trainer.train --config configs/distill_demo.yaml
	$(LAUNCH) -m trainer.evaluate --checkpoint demo/student --split dev
	$(LAUNCH) -m trainer.evaluate --checkpoint demo/student --split test
	$(BIN)/signscale compare demo/run demo/student

test: setup
	$(TEST)

test-slow: setup
	$(TEST) -m slow

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@if command -v shellcheck >/dev/null || [ "$$CLUSTER_TESTS" = required ]; then \
	  echo shellcheck $(SHELL_FILES); shellcheck $(SHELL_FILES); \
	else echo "no shellcheck here: shell files unchecked"; fi

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv demo runs build *.egg-info
