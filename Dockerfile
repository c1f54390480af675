# syntax=docker/dockerfile:1.7
# GPU image. NGC 26.07 carries torch 2.13.0a0, Triton 3.7.1, CUDA 13.3, Transformer Engine, flash-attn and DALI built for
# each other: a constraints file holds every package of the base at its version, so nothing below can replace them.
#   docker build -t rcm-megatron .    # on SLURM: enroot import dockerd://rcm-megatron
FROM nvcr.io/nvidia/pytorch:26.07-py3

ARG APEX_TAG=26.09
ARG MAX_JOBS=8
ARG TORCH_CUDA_ARCH_LIST="9.0;10.0"

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/rcm_megatron

RUN python -m pip list --format=freeze | grep -v '@ file' > /opt/base-constraints.txt \
    && grep -E '^torch==' /opt/base-constraints.txt
ENV PIP_CONSTRAINT=/opt/base-constraints.txt \
    PIP_DISABLE_PIP_VERSION_CHECK=1

# NVIDIA apex from its source tag: PyPI's `apex` is an unrelated project.
RUN git clone --quiet --depth 1 --branch "${APEX_TAG}" https://github.com/NVIDIA/apex.git /tmp/apex \
    && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_PARALLEL_BUILD="${MAX_JOBS}" NVCC_APPEND_FLAGS="--threads 4" \
       python -m pip install --no-cache-dir --no-build-isolation --no-deps /tmp/apex \
    && rm -rf /tmp/apex

# Our pins, less those of packages that the base brings.
COPY requirements.txt ./
RUN cut -d= -f1 /opt/base-constraints.txt | tr 'A-Z_' 'a-z-' | sort -u > /tmp/base-names \
    && grep -E '^[a-z]' requirements.txt \
       | while IFS= read -r line; do grep -qxF "${line%%==*}" /tmp/base-names || echo "${line}"; done \
       > /tmp/requirements.txt \
    && python -m pip install --no-cache-dir -r /tmp/requirements.txt

COPY . .
RUN python -m pip install --no-cache-dir --no-build-isolation --no-deps --editable .
RUN python <<'PY'
"""The base's packages are untouched, and what the program runs on is there. No GPU is needed to build."""
import importlib.metadata as metadata
import importlib.util

pinned = dict(line.strip().split("==") for line in open("/opt/base-constraints.txt") if line.count("==") == 1)
for name in ("torch", "triton"):
    assert metadata.version(name) == pinned.get(name, metadata.version(name)), f"{name} was replaced"
assert metadata.version("megatron-core") == "0.16.1"
missing = [name for name in ("amp_C", "apex", "flash_attn", "nvidia.dali", "transformer_engine") if not importlib.util.find_spec(name)]
assert not missing, f"missing: {missing}"
engine = metadata.version("transformer_engine")
assert tuple(map(int, engine.split(".")[:2])) >= (2, 9), f"Transformer Engine {engine} is too old for models/layer_specs.py"
PY
