# make train: the main job on a fresh machine.  make test: the tests.  make bench-check: is anything slower?  ACCEL=gpu for CUDA.
export ACCEL ?= cpu
python = .venv/bin/python

.PHONY: setup train test lint lock bench-check
setup:
	@tools/setup.sh
train: setup
	@$(python) jobs/demo.py
test: setup
	@$(python) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
lint: setup
	@.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy
bench-check: setup
	@$(python) tools/bench_check.py
lock: setup
	@tools/lock.sh
