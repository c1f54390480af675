"""Megatron's TransformerConfig for a model on a layout: what depends on the platform or the layout is decided here."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch

from rcm_megatron.platform.device import has_gpu
from rcm_megatron.platform.megatron import prepare_megatron

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

    from rcm_megatron.config import ModelConfig, ParallelConfig


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
    prepare_megatron()
    _check_layout(model, parallel, params_dtype)
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        **_shapes(model),
        **_degrees(parallel),
        **_sending(parallel, overlap_p2p_comm, deallocate_pipeline_outputs),
        params_dtype=params_dtype,
        bf16=params_dtype == torch.bfloat16,
        pipeline_dtype=pipeline_dtype or params_dtype,
        variable_seq_lengths=variable_seq_lengths,
        moe_token_dispatcher_type="alltoall" if variable_seq_lengths else "allgather",  # no MoE here, but it is checked
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


def _degrees(parallel: ParallelConfig) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": parallel.tp,
        "sequence_parallel": parallel.tp > 1,
        "context_parallel_size": parallel.cp,
        "pipeline_model_parallel_size": parallel.pp,
        "virtual_pipeline_model_parallel_size": parallel.vpp if (parallel.vpp or 1) > 1 else None,
    }


def _sending(parallel: ParallelConfig, overlap: bool | None, deallocate: bool | None) -> dict[str, bool]:
    """How stages send what they have computed; None: as `transformer_config` says."""
    if overlap is None:
        overlap = has_gpu() and (parallel.vpp or 1) > 1
    if deallocate is None:
        deallocate = not overlap
    if overlap and deallocate:
        raise ValueError(
            "got overlap_p2p_comm and deallocate_pipeline_outputs; need one of them at most: a stage's output would be "
            "freed while it is being sent; fix: deallocate_pipeline_outputs=False"
        )
    # batched and not overlapped, two interleaved stages receive each other's messages
    return {"batch_p2p_comm": False, "overlap_p2p_comm": overlap, "deallocate_pipeline_outputs": deallocate}


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
