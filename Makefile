# make train: the main job on a fresh machine.  make test: the tests.  make test-s3: those of object storage on a real
# server (Debian, root).  make bench-check: is anything slower?  ACCEL=gpu for CUDA.
export ACCEL ?= cpu
python = .venv/bin/python

.PHONY: setup train test test-s3 lint lock bench-check mutants
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
mutants: setup
	@$(python) tools/mutants.py
lock: setup
	@tools/lock.sh
test-s3: setup
	@tools/test_s3.sh
