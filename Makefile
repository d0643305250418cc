# make train: the main job on a fresh machine.  make test: the tests.  make test-s3: those of object storage on a real
# server (Debian, root).  make bench-check: is anything slower?  make soak: a hundred kills, 10,000 histories, 200 damaged
# inputs (long).  make mutants: are planted bugs found?  make audit: are vulnerabilities known of what is pinned?
# make sbom: what is pinned, as CycloneDX.  make docs: docs/configuration.md from the code.  ACCEL=gpu for
# CUDA.
export ACCEL ?= cpu
python = .venv/bin/python

.PHONY: setup train test test-s3 lint lock bench-check mutants soak audit sbom docs
setup:
	@tools/setup.sh
train: setup
	@$(python) jobs/demo.py
test: setup
	@$(python) -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder --durations=15
lint: setup
	@.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy
bench-check: setup
	@$(python) tools/bench_check.py
docs: setup
	@$(python) tools/configuration.py
mutants: setup
	@$(python) tools/mutants.py
soak: setup
	@CDR_HISTORIES=10000 CDR_DAMAGED=200 $(python) -m pytest -q -n 2 --dist worksteal -m "soak or not soak" -o timeout=7200 -s \
		tests/test_soak.py tests/test_histories.py tests/test_damaged_inputs.py tests/test_crashes.py tests/test_forget.py tests/test_ray_job.py \
		tests/test_ray_submit.py tests/test_nightly.py tests/test_bench.py
lock: setup
	@tools/lock.sh
audit: setup
	@tools/audit.sh
sbom: setup
	@tools/sbom.sh
test-s3: setup
	@tools/test_s3.sh
