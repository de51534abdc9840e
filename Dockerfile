# syntax=docker/dockerfile:1
#
# Two images from one file, both without root:
#   docker build --target api .                                  the HTTP front end, without torch
#   docker build --target worker .                               the worker, torch for CPUs
#   docker build --target worker --build-arg TORCH_BACKEND=cu130 .          torch for NVIDIA GPUs

FROM python:3.11-slim AS base
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN useradd --create-home --uid 10001 ddpm
WORKDIR /build
# Dependencies first: a change of our code then rebuilds none of their layers.
COPY LICENSE pyproject.toml requirements.lock ddpm.py ./
COPY jobs/version.py jobs/


FROM base AS api
RUN pip install --constraint requirements.lock '.[api]'
COPY jobs/ jobs/
COPY app/ app/
RUN pip install --no-deps --force-reinstall .
WORKDIR /home/ddpm
USER ddpm
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
CMD ["ddpm", "api", "--host", "0.0.0.0", "--port", "8000"]


FROM base AS worker
# torch.compile needs a C++ compiler, on GPUs as well.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
# uv knows where the builds of torch for each kind of device are.
ARG TORCH_BACKEND=cpu
RUN pip install uv==0.13.9 \
    && uv pip install --system --no-cache --torch-backend "$TORCH_BACKEND" \
        --constraint requirements.lock '.[worker]' \
    && pip uninstall --yes uv
COPY jobs/ jobs/
COPY diffusion/ diffusion/
COPY worker/ worker/
RUN pip install --no-deps --force-reinstall . \
    && install --directory --owner=ddpm /cache
# Compiled networks are kept between runs where a volume is mounted at /cache.
ENV DDPM_MODELS=/models DDPM_CACHE_DIR=/cache
WORKDIR /home/ddpm
USER ddpm
# Alive means registered: a worker whose heart stopped is forgotten by Redis.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s \
    CMD ["python", "-c", "import os, socket, sys; from redis import Redis; from rq import Worker; workers = Worker.all(Redis.from_url(os.environ['REDIS_URL'])); sys.exit(socket.gethostname() not in {worker.hostname for worker in workers})"]
CMD ["ddpm", "worker"]
