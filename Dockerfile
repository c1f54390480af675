# syntax=docker/dockerfile:1.7
# GPU image. NGC 26.07 carries torch 2.13.0a0, Triton 3.7.1, CUDA 13.3, Transformer Engine, flash-attn and DALI built for
# each other: a constraints file holds every package of the base at its version, so nothing below can replace them.
#   docker build -t rcm-megatron:0.1.0 .
#   docker run --rm --gpus all --ipc=host --ulimit memlock=-1 -v "$PWD/runs:/opt/rcm_megatron/runs" --user "$(id -u):$(id -g)" \
#       --env HOME=/tmp rcm-megatron:0.1.0 torchrun --standalone --nproc-per-node 8 -m rcm_megatron train model_configs/….yaml
# On SLURM: enroot import dockerd://rcm-megatron:0.1.0 (pyxis), or apptainer build image.sif docker-daemon://rcm-megatron:0.1.0.
# Both run it as the user who calls, with a home of their own; neither needs anything in the image.
FROM nvcr.io/nvidia/pytorch:26.07-py3@sha256:2140e699b3beaf7f96a0081fd9c9406bc3832b435cdb60dfa2d261f7d2f34a1c

# master of 2026-07-08; the newest tag is a year older
ARG APEX_COMMIT=6424da3b4faa6c8f062da4a48c424fff3f02d42d
ARG MAX_JOBS=8
ARG TORCH_CUDA_ARCH_LIST="9.0;10.0"

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/rcm_megatron

RUN python -m pip list --format=freeze | grep -v '@ file' > /opt/base-constraints.txt \
    && grep -E '^torch==' /opt/base-constraints.txt
# DALI decodes video on the GPU (NVDEC) only with the driver's `video` part.
ENV PIP_CONSTRAINT=/opt/base-constraints.txt \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,video

# NVIDIA apex from its source: PyPI's `apex` is an unrelated project.
RUN git init --quiet /tmp/apex \
    && git -C /tmp/apex fetch --quiet --depth 1 https://github.com/NVIDIA/apex.git "${APEX_COMMIT}" \
    && git -C /tmp/apex checkout --quiet FETCH_HEAD \
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

# Runs as a user of its own, who may write into runs/ and his home alone. Videos need no system package: PyAV and DALI bring their ffmpeg.
COPY . .
RUN python -m pip install --no-cache-dir --no-build-isolation --no-deps --editable . \
    && useradd --create-home --uid 10001 rcm \
    && install --directory --owner rcm --group rcm runs \
    && python -m rcm_megatron check --world-size 2 model_configs/quickstart.yaml > /dev/null
# hadolint ignore=DL3059
RUN python <<'PY'
"""The base's packages are untouched, and what the program runs on is there. No GPU is needed to build."""
import importlib.metadata as metadata
import importlib.util

pinned = dict(line.strip().split("==") for line in open("/opt/base-constraints.txt") if line.count("==") == 1)
for name in ("torch", "triton"):
    assert metadata.version(name) == pinned.get(name, metadata.version(name)), f"{name} was replaced"
assert metadata.version("megatron-core") == "0.19.2"
missing = [name for name in ("amp_C", "apex", "flash_attn", "nvidia.dali", "transformer_engine") if not importlib.util.find_spec(name)]
assert not missing, f"missing: {missing}"
engine = metadata.version("transformer_engine")
assert tuple(map(int, engine.split(".")[:2])) >= (2, 9), f"Transformer Engine {engine} is too old for models/layer_specs.py"
PY

USER 10001
