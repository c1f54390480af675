"""What this process runs on: its device, the torch.distributed backend that goes with it, and joining the other processes.

All decisions that depend on the machine ask here, so that a dry run can describe one that is not there (`stand_in`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Target:
    """What a rank runs on."""

    device: torch.device
    backend: str
    """Of torch.distributed."""
    has_gpu: bool
    """Whether what only a GPU can do is done: memory apart from the host's, messages beside compute."""


_described: Target | None = None


def target() -> Target:
    """This process's CUDA device with NCCL, the CPU with Gloo where there is none, or what `stand_in` described."""
    if _described is not None:
        return _described
    if torch.cuda.is_available():
        return Target(torch.device("cuda", torch.cuda.current_device()), "nccl", has_gpu=True)
    return Target(torch.device("cpu"), "gloo", has_gpu=False)


def stand_in(described: Target) -> None:
    """From here on `described` is what this process runs on. Call it before anything asks; there is no way back."""
    global _described
    _described = described


def this_device() -> torch.device:
    """This process's current CUDA device, or the CPU where there is no CUDA."""
    return target().device


def has_gpu() -> bool:
    """Whether `this_device()` is a GPU, or stands for one."""
    return target().has_gpu


def backend() -> str:
    """The torch.distributed backend that goes with `this_device()`."""
    return target().backend


def init_distributed(*, timeout: timedelta = timedelta(minutes=10)) -> None:
    """Join the process group that torchrun describes in the environment, or a group of one where it describes none."""
    if dist.is_initialized():
        return
    options: dict[str, Any] = {"backend": backend(), "timeout": timeout}
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        options["device_id"] = this_device()
    if "RANK" not in os.environ:
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    elif _agent_of_one_node_has_the_store():
        options |= {"store": _store_of_this_attempt(timeout), "rank": int(os.environ["RANK"])}
        options |= {"world_size": int(os.environ["WORLD_SIZE"])}
    dist.init_process_group(**options)


def _agent_of_one_node_has_the_store() -> bool:
    """Whether torchrun keeps one store for all attempts; agents of several nodes count their attempts apart."""
    environment = os.environ
    return environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and environment.get("GROUP_WORLD_SIZE") == "1"


def _store_of_this_attempt(timeout: timedelta) -> dist.Store:
    """The agent's store under a name of its own, for in the bare one restarted Gloo ranks find the addresses of dead ones (torch 2.13)."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timeout)
    return dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
