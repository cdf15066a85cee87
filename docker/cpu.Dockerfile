# syntax=docker/dockerfile:1.7
# Prune, export and measure on a CPU:
#   docker build -f docker/cpu.Dockerfile -t optin-deploy:cpu .
#   docker run --rm -v "$PWD/runs:/work/runs" optin-deploy:cpu prune-export --model deit_tiny --flops 0.5
FROM python:3.12.11-slim-bookworm

# Where PyTorch without CUDA comes from; PyPI's, with it, when empty.
ARG TORCH_INDEX_URL=""
ENV PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# hadolint ignore=DL3013
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "torch>=2.9,<3" "torchvision>=0.24,<1"

WORKDIR /opt/optin-deploy
COPY pyproject.toml README.md LICENSE ./
COPY optin_deploy optin_deploy
COPY exporters exporters
COPY profilers profilers
# hadolint ignore=DL3013
RUN --mount=type=cache,target=/root/.cache/pip pip install '.[cpu]'

RUN useradd --create-home --uid 1000 optin && install -d -o optin /work
USER 1000
WORKDIR /work
HEALTHCHECK --interval=5m --timeout=60s CMD ["optin-deploy", "env"]
ENTRYPOINT ["optin-deploy"]
CMD ["--help"]
