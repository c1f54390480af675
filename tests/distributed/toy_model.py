"""A small network with every kind of parameter that a layout treats differently, trained on fixed data.

bf16 (or fp32) tensor-parallel weights, a norm weight that is a tensor-parallel slice, replicated biases, and fp32
parameters that are replicated over tp with partial gradients. Sizes are odd, so that pieces of the distributed
optimizer begin and end inside parameters.
"""

import copy
import types

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, model_parallel_cuda_manual_seed
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint
from torch import nn

from rcm_megatron.config import OptimizerConfig, ParallelConfig
from rcm_megatron.parallel.groups import initialize_parallel
from rcm_megatron.parallel.transformer_config import transformer_config
from rcm_megatron.platform.megatron import prepare_megatron
from rcm_megatron.training.optimizer import build_optimizer, optimizer_step, set_learning_rate, wrap_ddp, zero_gradients

HIDDEN, FFN, TOKENS, SAMPLES = 23, 20, 12, 4
SHAPES = {
    "modulation": (3, HIDDEN),
    "fc1.weight": (FFN, HIDDEN),
    "fc1.bias": (FFN,),
    "norm": (FFN,),
    "fc2.weight": (HIDDEN, FFN),
    "fc2.bias": (HIDDEN,),
    "head": (HIDDEN, HIDDEN),
}
SPLIT_DIM = {"fc1.weight": 0, "fc1.bias": 0, "norm": 0, "fc2.weight": 1}
OPTIMIZER = OptimizerConfig(lr=1e-2, betas=(0.5, 0.999), weight_decay=0.01)


class Toy(MegatronModule):
    """[s_local, b, HIDDEN] -> [s_local, b, HIDDEN]."""

    def __init__(self, config, groups):
        super().__init__(config)
        self.groups = groups
        self.model_type, self.share_embeddings_and_output_weights = None, False
        self.modulation = nn.Parameter(torch.empty(3, HIDDEN))
        init = {"config": config, "init_method": nn.init.zeros_, "skip_bias_add": False, "tp_group": groups.tp}
        self.fc1 = ColumnParallelLinear(HIDDEN, FFN, bias=True, gather_output=False, **init)
        self.norm = nn.Parameter(torch.empty(FFN // groups.tp_size, dtype=config.params_dtype))
        self.norm.tensor_model_parallel, self.norm.partition_dim = True, 0
        self.fc2 = RowParallelLinear(FFN, HIDDEN, bias=True, input_is_parallel=True, **init)
        self.head = nn.Parameter(torch.empty(HIDDEN, HIDDEN))
        for parameter in (self.modulation, self.head):
            parameter.sequence_parallel = True
        self.modulation.shared_embedding = True  # a bucket of its own, as for parameters replicated over stages
        for name, parameter in self.named_parameters():
            parameter.data.copy_(local_part(full_weights()[name], name, groups))

    def forward(self, x_SBD):
        dtype = self.norm.dtype
        x = (x_SBD * self.modulation[0] + self.modulation[1]).to(dtype)
        x = torch.tanh(self.fc1(x)[0]) * self.norm
        return (self.fc2(x)[0].float() + self.modulation[2]) @ self.head

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        sharded = {}
        for name, parameter in self.named_parameters():
            replicas = {"tp_group": self.groups.tp, "dp_cp_group": self.groups.dp_cp}
            if name in SPLIT_DIM:
                key, axis = prefix + name, SPLIT_DIM[name]
                sharded[key] = make_tp_sharded_tensor_for_checkpoint(parameter, key, tp_axis=axis, **replicas)
            else:
                sharded[prefix + name] = make_sharded_tensor_for_checkpoint(parameter, prefix + name, **replicas)
        return sharded


def full_weights():
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in SHAPES.items()}


def local_part(full, name, groups):
    return full.chunk(groups.tp_size, dim=SPLIT_DIM[name])[groups.tp_rank] if name in SPLIT_DIM else full


def gather_full(local, groups):
    """Whole tensors by name from each tensor-parallel rank's part."""
    full = {}
    for name, tensor in local.items():
        full[name] = tensor.detach().float().clone()
        if name in SPLIT_DIM:
            parts = [torch.empty_like(full[name]) for _ in range(groups.tp_size)]
            dist.all_gather(parts, full[name].contiguous(), group=groups.tp)
            full[name] = torch.cat(parts, dim=SPLIT_DIM[name])
    return full


class ToyRun:
    """The toy, wrapped and optimized on this rank of a layout, and its fixed stream of batches."""

    def __init__(self, *, tp=1, cp=1, dtype=torch.float32, optimizer=OPTIMIZER):
        prepare_megatron()
        parallel = ParallelConfig(tp=tp, ring=cp)
        self.groups = initialize_parallel(parallel)
        model_parallel_cuda_manual_seed(1)
        shape = types.SimpleNamespace(num_layers=1, hidden_size=12, num_heads=2, ffn_hidden_size=FFN, eps=1e-6)
        self.config = transformer_config(shape, parallel, params_dtype=dtype)
        self._build(optimizer)

    def _build(self, optimizer):
        self.model = Toy(self.config, self.groups)
        self.chunks = wrap_ddp([self.model], self.config)
        self.optimizer = build_optimizer(self.chunks, optimizer)

    def twin(self):
        """Another network on the same layout."""
        other = copy.copy(self)
        other._build(OPTIMIZER)
        return other

    def backward(self, step, *, poison=False):
        """Finalized gradients of the mean over samples of the squared error, summed over tokens."""
        groups = self.groups
        generator = torch.Generator().manual_seed(step)
        data = torch.randn(2, TOKENS, SAMPLES, HIDDEN, generator=generator)
        data = data.chunk(groups.dp_size, dim=2)[groups.dp_rank].chunk(groups.token_shards, dim=1)[groups.token_shard]
        x, target = data
        zero_gradients(self.optimizer)
        samples = x.shape[1]
        loss = (self.chunks[0](x) - target).square().sum() / samples * groups.cp_size
        if poison and dist.get_rank() == dist.get_world_size() - 1:
            loss = loss * float("nan")
        loss.backward()
        finalize_model_grads(self.chunks)

    def train(self, steps):
        for step in steps:
            self.backward(step)
            set_learning_rate(self.optimizer, OPTIMIZER.lr)
            assert optimizer_step(self.optimizer, self.groups).updated

    def weights(self):
        return gather_full(dict(self.model.named_parameters()), self.groups)
