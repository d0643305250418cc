#!/usr/bin/env bash
# Writes the list of pinned packages, of both builds, as CycloneDX JSON: build/sbom.json, or the file that is named.
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-build/sbom.json}"
mkdir -p "$(dirname "$out")"
cat requirements/*.txt | PYTHONWARNINGS=ignore "${UV:-.venv/bin/uv}" tool run --from cyclonedx-bom==7.5.0 \
  cyclonedx-py requirements - --pyproject pyproject.toml --output-reproducible --output-file "$out"
echo "$out"
