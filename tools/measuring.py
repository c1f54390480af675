"""What the benchmarks share: bytes of tensors counted by PyTorch's dispatcher, on any device, and where a figure comes from."""

from __future__ import annotations

import os
import platform as host
import subprocess
import sys
import weakref
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from rcm_megatron.config import (
    DataConfig,
    DistillationConfig,
    EmaConfig,
    EncodersConfig,
    LatentConfig,
    ModelConfig,
    NetworkConfig,
    OptimizerConfig,
    RunConfig,
    TimeDistribution,
    TrainerConfig,
)
from rcm_megatron.families.wan.settings import WanModelConfig

ROOT = Path(__file__).resolve().parents[1]


class PeakBytes(TorchDispatchMode):
    """Peak of the bytes that operations allocate, or storages grow by, while it is active; what was there before does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._before: dict[int, int] = {}
        self._counted: dict[int, int] = {}

    def __enter__(self):
        resize = torch.UntypedStorage.resize_

        def tracked_resize(storage, size):
            self._meet(storage, before=storage.nbytes())
            resize(storage, size)
            self._count(storage)
            return storage

        self._restore = partial(setattr, torch.UntypedStorage, "resize_", resize)
        torch.UntypedStorage.resize_ = tracked_resize
        return super().__enter__()

    def __exit__(self, *exception):
        self._restore()
        return super().__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for value in tree_iter((args, kwargs)):
            if isinstance(value, Tensor):
                self._meet(value.untyped_storage(), before=None)
        outputs = func(*args, **(kwargs or {}))
        for value in tree_iter(outputs):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in self._before:
                self._meet(value.untyped_storage(), before=0)
                self._count(value.untyped_storage())
        return outputs

    def _meet(self, storage, *, before: int | None) -> None:
        """Note how large ``storage`` was before it is counted; None: as large as it is."""
        key = storage._cdata
        if key not in self._before:
            self._before[key], self._counted[key] = storage.nbytes() if before is None else before, 0
            weakref.finalize(storage, self._release, key)

    def _count(self, storage) -> None:
        key = storage._cdata
        bytes_now = storage.nbytes() - self._before[key]
        self.live += bytes_now - self._counted[key]
        self._counted[key] = bytes_now
        self.peak = max(self.peak, self.live)

    def _release(self, key: int) -> None:
        self.live -= self._counted.pop(key)
        del self._before[key]


TOKENS_OF_FRAME = 256
"""Of a latent of 32 x 32 in patches of 2 x 2."""


def check_sizes(*, hidden: int, head_dim: int, tokens: int) -> None:
    """End the command, before it starts anything, for sizes that make no network."""
    for name, value, unit, what in (
        ("--hidden", hidden, head_dim, "a multiple of --head-dim"),
        ("--tokens", tokens, TOKENS_OF_FRAME, "whole latent frames of"),
    ):
        if value < unit or value % unit:
            nearest = max(1, round(value / unit)) * unit
            raise SystemExit(f"got {name} {value}; need {what} {unit}; fix: {name} {nearest}")


def wan_model(*, layers: int, hidden: int, head_dim: int, **fields: Any) -> ModelConfig:
    """Wan2.1 in another size, with a short text unless ``fields`` of its settings say otherwise."""
    sizes = {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_heads": hidden // head_dim,
        "ffn_hidden_size": 4 * hidden,
    }
    inputs = {"in_channels": 16, "out_channels": 16, "patch_size": (1, 2, 2), "text_dim": 256, "text_len": 64}
    return WanModelConfig(**(sizes | inputs | fields))


def wan_run(name: str, model: ModelConfig, *, frames: int, batch: int, guidance: float, **fields: Any) -> RunConfig:
    """A run of random weights that reads and writes nothing by itself; ``fields`` are RunConfig's, its stages among them."""
    times = TimeDistribution(kind="uniform_shift", shift=5.0)
    return RunConfig(
        name=name,
        output_dir="",
        model=model,
        latent=LatentConfig(channels=model.in_channels, frames=frames, height=32, width=32),
        distillation=DistillationConfig(teacher_guidance=guidance, p_g=times, p_d=times),
        encoders=EncodersConfig(video="none", text="none"),
        data=DataConfig(folder=""),
        trainer=TrainerConfig(global_batch_size=batch, checkpoint_every=1),
        **fields,
    )


def random_networks(*trained: str, teacher: bool = True) -> dict[str, NetworkConfig]:
    """Networks of random weights: a teacher, and those that train, of which the student has an EMA."""
    adam, frozen = OptimizerConfig(lr=1e-6), {"teacher": NetworkConfig()} if teacher else {}
    ema = {"student": EmaConfig()}
    return frozen | {role: NetworkConfig(optimizer=adam, ema=ema.get(role)) for role in trained}


def provenance() -> dict[str, Any]:
    """Hardware, versions, commit and command of this process."""

    def output(*command: str) -> str:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0].split(":")[1].strip() if names else host.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": host.python_version(),
        "torch": torch.__version__,
        "megatron_core": version("megatron-core"),
        "commit": output("git", "rev-parse", "--short", "HEAD"),
        "uncommitted_changes": bool(output("git", "status", "--porcelain", "--", "rcm_megatron", "kernels", "tools")),
        "uptime": output("uptime"),
        "command": " ".join(["python", *sys.argv]),
    }
