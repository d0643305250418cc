#!/usr/bin/env bash
# Creates .venv from the pinned lists in requirements/. ACCEL=cpu (default) or gpu.
# A stamp holds the hash of the lists, so that the second call does nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
accel="${ACCEL:-cpu}"
case "$accel" in cpu|gpu) ;; *) echo "ACCEL=$accel: choose cpu or gpu" >&2; exit 2 ;; esac
python="${PYTHON:-python3.11}"
command -v "$python" >/dev/null || python=python3
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
  echo "Python 3.11 is needed; $python is $("$python" -V 2>&1). Set PYTHON=/path/to/python3.11" >&2; exit 2; }

want="$accel $(cat requirements/*.txt pyproject.toml tools/setup.sh | sha256sum | cut -c1-64)"
[ -f .venv/stamp ] && [ "$(cat .venv/stamp)" = "$want" ] && exit 0
echo "setting up .venv ($accel)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install -q --disable-pip-version-check uv==0.13.8
# uv does not read pip's variables; pip's find-links may hold the CPU build of torch.
if [ "$accel" = cpu ] && [ -n "${PIP_FIND_LINKS:-}" ]; then export UV_FIND_LINKS="$PIP_FIND_LINKS"; fi
export UV_LINK_MODE=copy
install() { .venv/bin/uv pip install -q --python .venv/bin/python --no-deps "$@"; }
if [ "$accel" = gpu ]; then
  install -r requirements/base.txt -r requirements/gpu.txt -r requirements/cuda-libs.txt
else
  install -r requirements/base.txt -r requirements/cpu.txt
  # Where no CPU build of torch was found, the CUDA build came: it runs on a CPU once its libraries are there.
  .venv/bin/python -c 'import torch' 2>/dev/null || install -r requirements/cuda-libs.txt
fi
install --no-build-isolation -e .
# Compiles what a worker imports, some 3,000 modules: where PYTHONDONTWRITEBYTECODE is set, every process would do it.
env -u PYTHONDONTWRITEBYTECODE .venv/bin/python -c '
import compileall, hypothesis, pytest, ray.train.torch, cdr_dist.training.worker
for folder in ray.__path__:
    for part in ("_private", "dashboard", "train"):
        compileall.compile_dir(f"{folder}/{part}", quiet=2)
'
echo "$want" > .venv/stamp
