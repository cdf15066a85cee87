# syntax=docker/dockerfile:1.7
# Prune, export, build engines and measure on an NVIDIA GPU:
#   docker build -f docker/gpu.Dockerfile -t optin-deploy:gpu .
#   docker run --rm --gpus all -v "$PWD/runs:/work/runs" optin-deploy:gpu \
#       prune-export --model deit_small --flops 0.5 --runtimes tensorrt,ort-cuda
# CUDA's and TensorRT's libraries come with their Python packages; the base has the driver's interface. CUDA 13 needs
# driver 580 or later on the host.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

# "tensorrt", or "rtx" for TensorRT for RTX.
ARG ENGINES=tensorrt
ENV PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/venv/bin:$PATH

# torch-compile-cuda needs the C compiler and Python's headers: Triton compiles launchers with them.
# hadolint ignore=DL3008
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked --mount=type=cache,target=/var/lib/apt,sharing=locked \
    apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev python3 python3-dev python3-venv \
    && python3 -m venv /opt/venv

# hadolint ignore=DL3013
RUN --mount=type=cache,target=/root/.cache/pip pip install "torch>=2.9,<3" "torchvision>=0.24,<1"

WORKDIR /opt/optin-deploy
COPY pyproject.toml README.md LICENSE ./
COPY optin_deploy optin_deploy
COPY exporters exporters
COPY profilers profilers
# hadolint ignore=DL3013
RUN --mount=type=cache,target=/root/.cache/pip pip install ".[gpu,$ENGINES]"

# The base has a user of its own with the number 1000.
RUN userdel --remove ubuntu && useradd --create-home --uid 1000 optin && install -d -o optin /work
USER 1000
WORKDIR /work
HEALTHCHECK --interval=5m --timeout=60s CMD ["optin-deploy", "env"]
ENTRYPOINT ["optin-deploy"]
CMD ["--help"]
