#!/usr/bin/env bash
# Writes the pinned lists in requirements/ from pyproject.toml. Run it after changing a dependency.
#   base.txt       everything both builds need      cpu.txt / gpu.txt   the fbgemm build
#   cuda-libs.txt  what the CUDA build of torch loads, needed where no CPU build of torch is found
set -euo pipefail
cd "$(dirname "$0")/.."
uv="${UV:-.venv/bin/uv}"
work="$(mktemp -d)"; trap 'rm -rf "$work"' EXIT
"$uv" pip compile pyproject.toml --extra cpu --group dev --no-header --no-annotate --no-emit-index-url --no-emit-find-links \
  --python-version 3.11 --python-platform x86_64-manylinux_2_28 -q -o "$work/all.txt"
is_cuda='^(nvidia|cuda|triton)[-a-z0-9]*=='
sed -i 's/+cpu$//' "$work/all.txt"
grep -E '^fbgemm-gpu-cpu==' "$work/all.txt" > requirements/cpu.txt
sed 's/-cpu==/==/' requirements/cpu.txt > requirements/gpu.txt
grep -E "$is_cuda" "$work/all.txt" > requirements/cuda-libs.txt
grep -vE "$is_cuda|^fbgemm" "$work/all.txt" > requirements/base.txt
wc -l requirements/*.txt
