"""The libraries that compute attention with lse, each as a (forward, backward) pair, and the choice between them.

    forward(q, k, v, scale) -> (o, lse)        backward(do, q, k, v, o, lse, scale) -> (dq, dk, dv)

on [s, b, n, d] tensors with a dense last dimension and at least one key; lse is [b, n, s]. (On zero keys the operator behind
`aten_cpu`, torch 2.13, dies of a floating point exception.)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rcm_kernels.choice import Choice
from rcm_kernels.flash_attention import reference
from rcm_kernels.gpu import capability

CUDNN_VERSION, CUDNN_HEAD_DIM = 91501, 128


@dataclass(frozen=True)
class Backend:
    """One implementation of attention; `name` as in `CHOICE.select`."""

    name: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, ...]]
    accumulates: bool = False
    """`backward` takes `dq`, an fp32 sum to which it adds, and then returns dk and dv in fp32."""


def candidates(device: str, dtype: torch.dtype, head_dim: int) -> list[str]:
    """Fastest first, by design and not by measurement. The CUDA flash kernels take half precision and head dims up to 256 only.

    flash-attn 2 and torch's flash attention use the matmul instructions of 8.0 on every GPU. cuDNN has kernels for those of 9.0 and
    10.x, and is torch's own first choice there; on other GPUs torch puts it behind flash attention, so that it is taken by name only.
    """
    if device == "cuda" and dtype in (torch.bfloat16, torch.float16) and head_dim <= 256:
        major, _ = capability()
        newer = ["flash_attn_3"] if major == 9 else []
        newer += ["cudnn"] if major in (9, 10) and head_dim <= CUDNN_HEAD_DIM else []
        return [*newer, "flash_attn_2", "aten_cuda", "triton", "reference"]
    if device == "cuda" and dtype == torch.float32 and head_dim <= 256:
        return ["triton", "reference"]
    if device == "cpu" and dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return ["aten_cpu", "reference"]
    return ["reference"]


def _checked(backend: Backend) -> Backend:
    """Refuse a library whose private interface or layout is not the one known here: one small case against the reference.

    As a ring calls it: odd lengths, strided views, batch 2, and a backward on some of the keys with the output and lse of all.
    """
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, do = torch.randn(77, 2, 2, 4, 64, device="cuda", generator=generator).bfloat16().unbind(3)
    some = k[:33], v[:33]
    o, lse = backend.forward(q, k, v, 0.125)
    results = o, lse, *backend.backward(do, q, *some, o, lse, 0.125)
    o, lse = reference.forward(q, k, v, 0.125)
    expected = o, lse, *reference.backward(do, q, *some, o, lse, 0.125)
    for name, got, want in zip(("o", "lse", "dq", "dk", "dv"), results, expected, strict=True):
        error = (
            float((got.float() - want.float()).norm() / want.float().norm()) if got.shape == want.shape else math.inf
        )
        if not error <= 0.03:
            raise RuntimeError(f"{backend.name} is not what is known here: its {name} is {error:.1e} off the reference")
    return backend


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.permute(1, 2, 0, 3) for x in tensors]  # [s, b, n, d] -> [b, n, s, d], a view


def _tokens_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.permute(2, 0, 1, 3) for x in tensors)


def _aten_cpu() -> Backend:
    forward_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        o, lse = forward_op(*_heads_first(q, k, v), scale=scale)
        return *_tokens_first(o), lse

    def backward(
        do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, ...]:
        do, q, k, v, o = _heads_first(do, q, k, v, o)
        return _tokens_first(*backward_op(do, q, k, v, o, lse, 0.0, False, scale=scale))

    return Backend("aten_cpu", forward, backward)


def aten_cuda() -> Backend:
    """PyTorch's own flash attention, unchecked."""
    forward_op = torch.ops.aten._scaled_dot_product_flash_attention
    backward_op = torch.ops.aten._scaled_dot_product_flash_attention_backward

    def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        o, lse = forward_op(*_heads_first(*_pad_head_dim(q, k, v)), scale=scale)[:2]
        return *_tokens_first(o[..., : q.shape[-1]]), lse

    def backward(
        do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, ...]:
        seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # read with dropout only
        padded = _heads_first(*_pad_head_dim(do, q, k, v, o))
        ends = None, None, q.shape[0], k.shape[0]
        grads = backward_op(*padded, lse.contiguous(), *ends, 0.0, False, seed, seed, scale=scale)
        return _tokens_first(*(x[..., : q.shape[-1]] for x in grads))

    return Backend("aten_cuda", forward, backward)


def _cudnn() -> Backend:
    """cuDNN as torch wraps it; head dims up to 128."""
    version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    if version is None or version < CUDNN_VERSION:
        raise RuntimeError(
            f"got cuDNN {version}; need {CUDNN_VERSION}: before, it is wrong for lengths that 128 does not divide (torch's own bound)"
        )
    if torch.are_deterministic_algorithms_enabled():
        raise RuntimeError("cuDNN's backward adds up in any order, but torch.use_deterministic_algorithms is on")
    forward_op = torch.ops.aten._scaled_dot_product_cudnn_attention
    backward_op = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
    x = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16, device="cuda")
    lse_tail = forward_op(x, x, x, None, True)[1].shape[3:]
    return _checked(_cudnn_backend(forward_op, backward_op, lse_tail))


def _cudnn_backend(forward_op: Callable[..., Any], backward_op: Callable[..., Any], lse_tail: Sequence[int]) -> Backend:
    """`lse_tail`: dims of torch's lse after [b, n, s]: (1,) or none, by torch's version. The backward takes what the forward gives.

    torch keeps a compiled graph per shapes and strides of q, k and v, and runs it on whatever strides o, do and lse come with: they
    are contiguous here, always. A single key is not supported by cuDNN (torch's can_use_cudnn_attention): the reference takes it.
    """

    def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        _check_for_cudnn(q)
        if k.shape[0] == 1:
            return reference.forward(q, k, v, scale)
        o, lse = forward_op(*_heads_first(*_pad_head_dim(q, k, v)), None, True, scale=scale)[:2]
        return *_tokens_first(o[..., : q.shape[-1]]), lse.flatten(2)

    def backward(
        do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, ...]:
        _check_for_cudnn(q)
        if k.shape[0] == 1:
            return reference.backward(do, q, k, v, o, lse, scale)
        seed = torch.empty((), dtype=torch.int64, device=q.device)  # read with dropout only
        padded = _heads_first(*_pad_head_dim(do.contiguous(), q, k, v, o.contiguous()))
        lse = lse.contiguous().view(*lse.shape, *lse_tail)
        no_bias_nor_bounds = None, None, None
        lengths = q.shape[0], k.shape[0]
        grads = backward_op(*padded, lse, seed, seed, *no_bias_nor_bounds, *lengths, 0.0, False, scale=scale)
        return _tokens_first(*(x[..., : q.shape[-1]] for x in grads))

    return Backend("cudnn", forward, backward)


def _check_for_cudnn(q: Tensor) -> None:
    """torch's operators themselves check neither: they would read fp32 as fp16."""
    if q.dtype not in (torch.bfloat16, torch.float16) or q.shape[-1] > CUDNN_HEAD_DIM:
        raise ValueError(
            f"got {q.dtype} with head dim {q.shape[-1]} for the attention backend 'cudnn'; need bfloat16 or float16 and at most "
            f"{CUDNN_HEAD_DIM}; fix: select_backend('auto')"
        )


def _pad_head_dim(*tensors: Tensor) -> Sequence[Tensor]:
    """The CUDA kernels want a head dim that divides by 8; zeros change neither scores nor outputs."""
    missing = -tensors[0].shape[-1] % 8
    return [F.pad(x, (0, missing)) for x in tensors] if missing else tensors


def _batch_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(0, 1) for x in tensors]  # [s, b, n, d] -> [b, s, n, d], the flash-attn packages' layout


def _flash_attn_2() -> Backend:
    from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_forward

    plain = {"dropout_p": 0.0, "causal": False, "softcap": 0.0, "alibi_slopes": None}
    plain |= {"window_size_left": -1, "window_size_right": -1}

    def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        padded = _batch_first(*_pad_head_dim(q, k, v))
        o, lse = _flash_attn_forward(*padded, softmax_scale=scale, return_softmax=False, **plain)[:2]
        return o[..., : q.shape[-1]].transpose(0, 1), lse

    def backward(
        do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, ...]:
        do, q_pad, k_pad, v_pad, o = _batch_first(*_pad_head_dim(do, q, k, v, o))
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_pad, k_pad, v_pad)]
        _flash_attn_backward(do, q_pad, k_pad, v_pad, o, lse, *grads, softmax_scale=scale, deterministic=False, **plain)
        return tuple(x[..., : q.shape[-1]].transpose(0, 1) for x in grads)

    return _checked(Backend("flash_attn_2", forward, backward))


def _flash_attn_3() -> Backend:
    from flash_attn_interface import _flash_attn_backward, _flash_attn_forward

    def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        o, lse = _flash_attn_forward(*_batch_first(*_pad_head_dim(q, k, v)), softmax_scale=scale)[:2]
        return o[..., : q.shape[-1]].transpose(0, 1), lse

    def backward(
        do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, ...]:
        do, q_pad, k_pad, v_pad, o = _batch_first(*_pad_head_dim(do, q, k, v, o))
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_pad, k_pad, v_pad))
        _flash_attn_backward(do, q_pad, k_pad, v_pad, o, lse, dq=dq, dk=dk, dv=dv, softmax_scale=scale)
        return tuple(x[..., : q.shape[-1]].transpose(0, 1) for x in (dq, dk, dv))

    return _checked(Backend("flash_attn_3", forward, backward))


def _triton() -> Backend:
    from rcm_kernels import launch
    from rcm_kernels.flash_attention import triton_impl

    launch.check_machine()
    backend = Backend("triton", triton_impl.forward, triton_impl.backward, accumulates=True)
    return backend if launch.INTERPRETED else _checked(backend)


_LOADERS: dict[str, Callable[[], Backend]] = {
    "flash_attn_3": _flash_attn_3,
    "flash_attn_2": _flash_attn_2,
    "cudnn": _cudnn,
    "aten_cuda": lambda: _checked(aten_cuda()),
    "aten_cpu": _aten_cpu,
    "triton": _triton,
    "reference": lambda: Backend("reference", reference.forward, reference.backward),
}
CHOICE = Choice("attention", _LOADERS, candidates, slow="reference")
select_backend, load = CHOICE.select, CHOICE.load


def backend_for(q: Tensor) -> Backend:
    """The backend for q's device, dtype and head dim; chosen and logged once per combination."""
    return CHOICE.settle(q.device.type, q.dtype, q.shape[-1])[1]
