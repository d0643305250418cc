#!/usr/bin/env bash
# Asks PyPI's database of vulnerabilities about every pinned package; exit code 1 where one is known, or where a package
# could not be looked up: no answer is no all-clear.
set -euo pipefail
cd "$(dirname "$0")/.."
"${UV:-.venv/bin/uv}" tool run pip-audit@2.10.1 --strict --no-deps --disable-pip --progress-spinner off \
  -r requirements/base.txt -r requirements/cpu.txt -r requirements/gpu.txt -r requirements/cuda-libs.txt
