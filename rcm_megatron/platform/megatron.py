"""Megatron-Core as the program needs it: a version whose internals are known, runnable without CUDA, with an Adam that resumes.

Import this module before any other that imports `megatron.core`: it also silences warnings that are no news, and imports Megatron
without torch's compiler.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings

import torch

from rcm_megatron.errors import InstallationError
from rcm_megatron.platform import MEGATRON_VERSION, megatron_cpu, released
from rcm_megatron.platform.device import this_device

log = logging.getLogger(__name__)

_NO_NEWS = (
    r"`torch\.distributed\.\w+` is deprecated",  # Megatron's calls
    r"`torch\.jit\.script",
    "`load_state_dict` is deprecated",  # Megatron's dist_checkpointing calls it on torch's
    "absl.logging is not installed",
    "MimoModelConfig is experimental",
)
_NO_NEWS_ON_CPU = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "When using sequence parallelism it is recommended to set",
)
for _message in _NO_NEWS if torch.cuda.is_available() else _NO_NEWS + _NO_NEWS_ON_CPU:
    warnings.filterwarnings("ignore", message=_message)


def _import_megatron() -> None:
    """`import megatron.core` without torch's compiler and wandb, which are half of what it costs.

    Megatron decorates functions that this program never calls with `torch.compile`, which imports all of inductor at once; its timers,
    which this program does not use either, import wandb. From 0.19 on it asks git for a commit, each rank again."""
    os.environ.setdefault("NO_VCS_VERSION", "1")
    compile, no_wandb = torch.compile, "wandb" not in sys.modules
    torch.compile = lambda function=None, **_: function
    if no_wandb:
        sys.modules["wandb"] = None
    try:
        import megatron.core  # noqa: F401
    finally:
        torch.compile = compile
        if no_wandb:
            del sys.modules["wandb"]


_import_megatron()


@functools.cache
def prepare_megatron() -> None:
    """Check Megatron's version and, without CUDA, make it run on `this_device()`. Call before building anything; idempotent.

    Raises InstallationError for a Megatron that is not the one this was written for."""
    _check_version()
    # From 0.19 on: the layout that DDP computes by itself is the one meant, and a checkpoint keeps its common.pt.
    _silence("megatron.core.distributed.distributed_data_parallel", "full_param_layout not provided")
    _silence("megatron.core.dist_checkpointing.strategies.common", "load_common is deprecated")
    if not torch.cuda.is_available():
        megatron_cpu.install(MEGATRON_VERSION, this_device())


def _silence(logger: str, message: str) -> None:
    logging.getLogger(logger).addFilter(lambda record: message not in record.getMessage())


def _check_version() -> None:
    import megatron.core

    if released(megatron.core.__version__) != MEGATRON_VERSION:
        python = "{}.{}".format(*sys.version_info)
        raise InstallationError(
            f"got megatron-core {megatron.core.__version__}; need {MEGATRON_VERSION} on Python {python}, the one whose internals "
            f"rcm_megatron/platform knows; fix: pip install megatron-core=={MEGATRON_VERSION}"
        )


def use_adam(adam_class: type[torch.optim.Optimizer]) -> None:
    """Make Megatron's optimizers build `adam_class` where neither Apex nor Transformer Engine is installed, CUDA or not.

    Megatron then falls back on torch's AdamW, whose per-parameter `step` it merges into one on loading: a resumed
    run silently diverges. `adam_class` keeps Apex's contract (`step` in the parameter group), and Megatron is told so."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return
    if torch.cuda.is_available():
        log.info("neither Apex nor Transformer Engine is installed: Adam is %s", adam_class.__name__)
    optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = adam_class, False
    distrib_optimizer.Adam, distrib_optimizer.HAVE_APEX_OR_TE = adam_class, True
    distrib_optimizer.USING_APEX_OPTIMIZER = True
