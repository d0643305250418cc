# The image of every pod: docker build --build-arg ACCEL=gpu -t registry.example.com/cdr-dist:0.1.0-gpu .
# It holds all packages, so nothing is installed when a pod starts. It needs two writable folders: /tmp and /home/cdr.
FROM python:3.11.14-slim-bookworm AS packages
ARG ACCEL=cpu
WORKDIR /app
# Bytecode is compiled here: on a read-only root every process would do it again.
ENV PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1 UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1
RUN python -m venv .venv && .venv/bin/python -m pip install -q --disable-pip-version-check uv==0.13.8
COPY requirements requirements
# As in tools/setup.sh, without its stamp: what pip would resolve from torchrec's metadata overwrites the CPU build.
RUN set -eu; \
    install() { .venv/bin/uv pip install -q --python .venv/bin/python --no-deps "$@"; }; \
    case "$ACCEL" in \
      gpu) install -r requirements/base.txt -r requirements/gpu.txt -r requirements/cuda-libs.txt ;; \
      cpu) install -r requirements/base.txt -r requirements/cpu.txt; \
           .venv/bin/python -c 'import torch' 2>/dev/null || install -r requirements/cuda-libs.txt ;; \
      *) echo "ACCEL=$ACCEL: choose cpu or gpu" >&2; exit 2 ;; \
    esac
COPY pyproject.toml README.md LICENSE ./
COPY cdr_dist cdr_dist
COPY jobs jobs
COPY configs configs
COPY tools tools
RUN .venv/bin/uv pip install -q --python .venv/bin/python --no-deps --no-build-isolation -e . && \
    .venv/bin/python -m compileall -q cdr_dist jobs

FROM python:3.11.14-slim-bookworm
# KubeRay's probes call wget and bash.
RUN apt-get update && apt-get install -y --no-install-recommends wget && rm -rf /var/lib/apt/lists/* && \
    groupadd --gid 10001 cdr && useradd --uid 10001 --gid 10001 --create-home --home-dir /home/cdr cdr
COPY --from=packages /app /app
WORKDIR /app
ENV PATH=/app/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/home/cdr \
    RAY_TMPDIR=/tmp \
    RAY_USAGE_STATS_ENABLED=0 \
    NUMBA_CACHE_DIR=/home/cdr/.cache/numba \
    MPLCONFIGDIR=/home/cdr/.config/matplotlib \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
CMD ["python", "jobs/train.py", "--help"]
