"""This process's device, the torch.distributed backend that goes with it, and joining the other processes."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def this_device() -> torch.device:
    """This process's current CUDA device, or the CPU where there is no CUDA."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def backend() -> str:
    """The torch.distributed backend that goes with `this_device()`."""
    return "nccl" if torch.cuda.is_available() else "gloo"


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
    dist.init_process_group(**options)
