"""Device, backend, and what Megatron-Core 0.16.1 needs to run on CPU/Gloo as well as on CUDA/NCCL.

Megatron-Core has no CPU device. It asks for one in three ways, and `install()` answers each where there is no CUDA:
`torch.cuda.*` functions (replaced), random-state helpers of `tensor_parallel.random` (replaced), and the literals
"cuda" and "torch.cuda.FloatTensor" inside functions (rewritten in those functions' constants: no cost at run time, and
the same in every thread, autograd's too). Each replaced place is counted, and another version of Megatron, or other counts,
is an error: upstream tests none of this on CPU.

Import this module before any other that imports `megatron.core`: it also silences warnings that are no news on CPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import logging
import os
import types
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

    from rcm_megatron.config import ModelConfig, ParallelConfig

log = logging.getLogger(__name__)

MEGATRON_VERSION = "0.16.1"

LITERALS = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}

REWRITTEN_FUNCTIONS = {
    "megatron.core.optimizer.optimizer": 3,
    "megatron.core.optimizer.distrib_optimizer": 2,
    "megatron.core.optimizer.clip_grads": 3,
    "megatron.core.pipeline_parallel.schedules": 4,
    "megatron.core.utils": 3,
    "megatron.core.dist_checkpointing.exchange_utils": 2,
    "megatron.core.dist_checkpointing.strategies.state_dict_saver": 1,
}
"""Module -> how many of its functions hold one of LITERALS, in MEGATRON_VERSION."""

_NO_NEWS = (
    r"`torch\.distributed\.\w+` is deprecated",  # Megatron's calls
    r"`torch\.jit\.script",
    "`load_state_dict` is deprecated",  # Megatron's dist_checkpointing calls it on torch's
)
_NO_NEWS_ON_CPU = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "When using sequence parallelism it is recommended to set",
)
for _message in _NO_NEWS if torch.cuda.is_available() else _NO_NEWS + _NO_NEWS_ON_CPU:
    warnings.filterwarnings("ignore", message=_message)


def device() -> torch.device:
    """This process's device: its current CUDA device, or the CPU where there is no CUDA."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def backend() -> str:
    """The torch.distributed backend that goes with `device()`."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def init_distributed(*, timeout: timedelta = timedelta(minutes=10)) -> None:
    """Join the process group that torchrun describes in the environment, or a group of one where it describes none."""
    if dist.is_initialized():
        return
    options: dict[str, Any] = {"backend": backend(), "timeout": timeout}
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        options["device_id"] = device()
    if "RANK" not in os.environ:
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(**options)


@functools.cache
def install() -> None:
    """Check Megatron's version and, without CUDA, make it run on the CPU. Call before building anything; idempotent.

    Raises RuntimeError for a Megatron that is not the one this was written for."""
    _check_version()
    if torch.cuda.is_available():
        return
    rewritten = {name: _rewritten_functions(importlib.import_module(name)) for name in REWRITTEN_FUNCTIONS}
    for name, functions in rewritten.items():
        _check_count(name, got=len(functions), need=REWRITTEN_FUNCTIONS[name])
    _replace_random_state()
    _replace_cuda_functions()
    for functions in rewritten.values():
        for function, code in functions.items():
            function.__code__ = code


def _check_version() -> None:
    import megatron.core

    if megatron.core.__version__ != MEGATRON_VERSION:
        raise RuntimeError(
            f"got megatron-core {megatron.core.__version__}; need {MEGATRON_VERSION}, whose internals "
            f"rcm_megatron/platform.py knows; fix: pip install megatron-core=={MEGATRON_VERSION}"
        )


def _check_count(module_name: str, *, got: int, need: int) -> None:
    if got != need:
        raise RuntimeError(
            f"{module_name}: got {got} functions with CUDA literals; need {need}, as in megatron-core "
            f"{MEGATRON_VERSION}; fix: pip install --force-reinstall megatron-core=={MEGATRON_VERSION}, or, for a "
            "new version, review that module and platform.REWRITTEN_FUNCTIONS"
        )


def _replace_cuda_functions() -> None:
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu  # Megatron passes its result on as device=...
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.Tensor.cuda = lambda self, *args, **kwargs: self


def _replace_random_state() -> None:
    """Megatron's tracker and `checkpoint` then save, set and restore the CPU generator's state."""
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    for name in ("_get_cuda_rng_state", "_set_cuda_rng_state"):
        if not hasattr(random, name):
            raise RuntimeError(f"{random.__name__}: got no {name}; need it to be there to replace it; fix: install "
                               f"megatron-core=={MEGATRON_VERSION}")  # fmt: skip
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # On the CPU both generators are one, so the tracker's check that they are two always fires.
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _rewritten_functions(module: types.ModuleType) -> dict[types.FunctionType, types.CodeType]:
    """The functions of `module` that hold one of LITERALS, each with its code for the CPU."""
    rewritten = {function: _with_cpu_literals(function.__code__) for function in _functions_of(module)}
    return {function: code for function, code in rewritten.items() if code is not function.__code__}


def _functions_of(module: types.ModuleType) -> Iterator[types.FunctionType]:
    """Functions and methods (properties, class methods and decorated ones too) that `module` itself defines."""
    classes = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    for owner in (module, *classes):
        for value in vars(owner).values():
            for candidate in (value, getattr(value, "fget", None), getattr(value, "__func__", None)):
                function = inspect.unwrap(candidate) if callable(candidate) else None
                if isinstance(function, types.FunctionType) and function.__module__ == module.__name__:
                    yield function


def _with_cpu_literals(constant: Any) -> Any:
    """`constant` (of a code object; code objects and tuples nest) with LITERALS replaced; itself if it holds none."""
    if isinstance(constant, str):
        return LITERALS.get(constant, constant)
    if isinstance(constant, tuple):
        replaced = tuple(map(_with_cpu_literals, constant))
        return constant if all(new is old for new, old in zip(replaced, constant, strict=True)) else replaced
    if isinstance(constant, types.CodeType):
        constants = _with_cpu_literals(constant.co_consts)
        return constant if constants is constant.co_consts else constant.replace(co_consts=constants)
    return constant


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


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    params_dtype: torch.dtype,
    pipeline_dtype: torch.dtype | None = None,
    variable_seq_lengths: bool = False,
    overlap_p2p_comm: bool | None = None,
    deallocate_pipeline_outputs: bool | None = None,
    perform_initialization: bool = True,
) -> TransformerConfig:
    """Megatron's TransformerConfig: every choice that depends on the platform or the layout is made here.

    `pipeline_dtype` (default `params_dtype`): dtype of the hidden state sent between stages. `variable_seq_lengths`:
    stages exchange shapes first. `overlap_p2p_comm` (default: on CUDA with virtual stages). `deallocate_pipeline_outputs`: a stage
    frees what it has sent (default: where sends are not overlapped); with a dual that is two hidden states for each micro-batch in flight.
    Raises ValueError for what Megatron accepts and gets wrong."""
    install()
    _check_layout(model, parallel, params_dtype)
    from megatron.core.transformer import TransformerConfig

    virtual_stages = parallel.vpp if (parallel.vpp or 1) > 1 else None
    if overlap_p2p_comm is None:
        overlap_p2p_comm = torch.cuda.is_available() and virtual_stages is not None
    if deallocate_pipeline_outputs is None:
        deallocate_pipeline_outputs = not overlap_p2p_comm
    if overlap_p2p_comm and deallocate_pipeline_outputs:
        raise ValueError(
            "got overlap_p2p_comm and deallocate_pipeline_outputs; need one of them at most: a stage's output would be "
            "freed while it is being sent; fix: deallocate_pipeline_outputs=False"
        )
    config = TransformerConfig(
        **_shapes(model),
        tensor_model_parallel_size=parallel.tp,
        sequence_parallel=parallel.tp > 1,
        context_parallel_size=parallel.cp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=virtual_stages,
        params_dtype=params_dtype,
        bf16=params_dtype == torch.bfloat16,
        pipeline_dtype=pipeline_dtype or params_dtype,
        variable_seq_lengths=variable_seq_lengths,
        moe_token_dispatcher_type="alltoall" if variable_seq_lengths else "allgather",  # no MoE here, but it is checked
        batch_p2p_comm=False,  # batched and not overlapped, two interleaved stages receive each other's messages
        overlap_p2p_comm=overlap_p2p_comm,
        deallocate_pipeline_outputs=deallocate_pipeline_outputs,
        calculate_per_token_loss=False,
        gradient_accumulation_fusion=_importable("fused_weight_gradient_mlp_cuda"),
        perform_initialization=perform_initialization,
        cuda_graph_scope=[],  # the default, "full", warns that it is deprecated
        **_FUSIONS_OFF,
    )
    config.has_cond_embedder = parallel.pp > 1  # finalize_model_grads then sums replicated embedders over the stages
    return config


_FUSIONS_OFF = {
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
}
"""Megatron's fused element-wise kernels have no tangent rule; the blocks here use only its linear layers."""


def _shapes(model: ModelConfig) -> dict[str, Any]:
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_heads,
        "ffn_hidden_size": model.ffn_hidden_size,
        "layernorm_epsilon": model.eps,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "add_bias_linear": True,
        "qk_layernorm": False,  # True makes finalize_model_grads sum q/k norm gradients over tp: ours are slices
    }


def _check_layout(model: ModelConfig, parallel: ParallelConfig, params_dtype: torch.dtype) -> None:
    if params_dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(
            f"got params_dtype={params_dtype}; need bfloat16 or float32 (float64: tests); fix: set the run's precision"
        )
    if model.num_heads % parallel.tp:
        raise ValueError(
            f"got num_heads={model.num_heads}, tp={parallel.tp}; need heads divisible by tp; fix: lower tp"
        )
    if (parallel.vpp or 1) > 1 and parallel.pp < 2:
        raise ValueError(f"got vpp={parallel.vpp}, pp={parallel.pp}; need pp >= 2 for virtual stages; fix: vpp: 1")
    if parallel.pp * (parallel.vpp or 1) > model.num_layers:
        raise ValueError(
            f"got pp*vpp={parallel.pp * (parallel.vpp or 1)} stages for num_layers={model.num_layers}; need a layer for "
            "every stage; fix: lower pp or vpp"
        )


def _importable(module_name: str) -> bool:
    return torch.cuda.is_available() and importlib.util.find_spec(module_name) is not None
