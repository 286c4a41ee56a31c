# A node of a cluster, or a machine to search on, as an image:
#   docker build -t cse-autoloss .
#   docker run --rm -it -v $PWD/runs:/data/runs cse-autoloss run --preset quickstart
# A Ray node: docker run --network host --shm-size 8g --entrypoint ray cse-autoloss start --address HEAD:6379 --block
# For GPUs start from a CUDA "devel" image with Python 3.11 (--build-arg BASE=...): mmcv-full's CUDA ops need nvcc.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}
RUN apt-get update && apt-get install -y --no-install-recommends g++ make git && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/cse_autoloss
# What is compiled depends on these files alone: a change of the code does not compile again.
COPY constraints.txt ./
COPY scripts/build_mmcv.py scripts/
RUN python -m venv .venv && .venv/bin/pip install --no-cache-dir -c constraints.txt \
        torch numpy opencv-python-headless "setuptools<81" wheel ninja psutil && \
    .venv/bin/python scripts/build_mmcv.py /opt/wheels && \
    .venv/bin/pip install --no-cache-dir -c constraints.txt /opt/wheels/*.whl
COPY . .
RUN .venv/bin/pip install --no-cache-dir -c constraints.txt --no-build-isolation -e ".[detectors]"
ENV PATH=/opt/cse_autoloss/.venv/bin:$PATH
WORKDIR /data
ENTRYPOINT ["cse-search"]
