"""Networks for the interop tests: diffusers' class with distinct values, and a module with one tp rank's parameters."""

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from rcm_megatron.checkpoint.translate import internal_shapes
from tests.networks import wan

TINY = {
    "num_attention_heads": 4,
    "attention_head_dim": 6,
    "num_layers": 2,
    "ffn_dim": 40,
    "text_dim": 10,
    "freq_dim": 14,
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": (1, 2, 2),
}
CONFIG = wan(hidden_size=24, ffn_hidden_size=40, freq_dim=14)
_COLUMN = ("linear_qkv.weight", "linear_qkv.bias", "linear_q.weight", "linear_q.bias", "linear_kv.weight")
_COLUMN += ("linear_kv.bias", "linear_fc1.weight", "linear_fc1.bias", "q_norm.weight", "k_norm.weight")
_ROW = ("linear_proj.weight", "linear_fc2.weight")


def save_tiny(folder, *, max_shard_size="10GB", **changes):
    """Save a WanTransformer3DModel whose parameters all differ from each other; returns its state dict."""
    model = WanTransformer3DModel(**{**TINY, **changes})
    start = 0
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.arange(start, start + parameter.numel(), dtype=torch.float32)
            parameter.copy_(values.view(parameter.shape).sub_(20_000).mul_(1e-5))
            start += parameter.numel()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model.state_dict()


def split_dim(name):
    """The dimension that tensor parallelism splits, from the contract's list and not from the code under test."""
    return 0 if name.endswith(_COLUMN) else 1 if name.endswith(_ROW) else None


class RankModel(nn.Module):
    """Empty parameters with the names, local shapes and attributes that a built Megatron model has on one tp rank."""

    def __init__(self, config=CONFIG, *, tp_size=1, dtype=torch.float32, only=""):
        super().__init__()
        for name, shape in internal_shapes(config).items():
            if name.startswith(only):
                self._add(name, list(shape), tp_size, dtype)

    def _add(self, name, shape, tp_size, dtype):
        dim = split_dim(name)
        if dim is not None:
            shape[dim] //= tp_size
        parameter = nn.Parameter(torch.full(shape, float("nan"), dtype=dtype))
        parameter.tensor_model_parallel = dim is not None
        parameter.partition_dim = -1 if dim is None else dim
        *path, leaf = name.split(".")
        module = self
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_parameter(leaf, parameter)


def assert_same_tensors(expected, got):
    """Equal keys, dtypes and bits."""
    assert set(expected) == set(got), f"keys differ: {sorted(set(expected) ^ set(got))[:6]}"
    for name, tensor in expected.items():
        assert tensor.dtype == got[name].dtype, f"{name}: {got[name].dtype}"
        assert torch.equal(tensor, got[name]), f"{name} differs"
