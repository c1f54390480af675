"""The one place that chooses layer classes: Megatron-Core's own linears, or another library's with the same contract."""

from dataclasses import dataclass

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear


@dataclass(frozen=True)
class LayerSpec:
    """Classes of which a DiT block builds its tensor-parallel linears."""

    column_linear: type
    row_linear: type


def local_layer_spec() -> LayerSpec:
    """Megatron-Core's pure-PyTorch linears: run on CPU and CUDA."""
    return LayerSpec(column_linear=ColumnParallelLinear, row_linear=RowParallelLinear)
