"""Mathematics of rCM distillation: no network, no rank, no configuration object.

Every function works on any tensor layout; times `t` arrive in a shape that broadcasts against the data
(`[b, 1, 1, 1, 1]` for videos `[b, c, t, h, w]`, `[1, b, 1]` for token shards `[s, b, p]`).

A module runs when something in it is first used: `from rcm_megatron.diffusion import losses` imports no torch, so that objectives can be
checked without it.
"""

import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rcm_megatron.diffusion import flow_maps, losses, noise, samplers, timesteps, trigflow  # noqa: F401


def _lazy(name: str) -> ModuleType:
    """The submodule `name`, run at its first use (the standard library's recipe)."""
    spec = importlib.util.find_spec(f"{__name__}.{name}")
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


for _name in ("flow_maps", "losses", "noise", "samplers", "timesteps", "trigflow"):
    globals()[_name] = _lazy(_name)
