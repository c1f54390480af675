"""The libraries that compute attention with lse, each as a (forward, backward) pair, and the choice between them.

    forward(q, k, v, scale) -> (o, lse)        backward(do, q, k, v, o, lse, scale) -> (dq, dk, dv)

on [s, b, n, d] tensors with a dense last dimension and at least one key; lse is [b, n, s]. (On zero keys the operator behind
`aten_cpu`, torch 2.13, dies of a floating point exception.)
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from rcm_kernels.flash_attention import reference

_logger = logging.getLogger(__name__)
_forced: str | None = None


@dataclass(frozen=True)
class Backend:
    """One implementation of attention; `name` as in `select_backend`."""

    name: str
    forward: Callable
    backward: Callable
    accumulates: bool = False
    """`backward` takes `dq`, an fp32 sum to which it adds, and then returns dk and dv in fp32."""


def select_backend(name):
    """Force one backend for this process; "auto" undoes it. It is then given everything: there is no silent fallback."""
    global _forced
    if name != "auto" and name not in _LOADERS:
        raise ValueError(
            f"got attention backend {name!r}; need one of auto, {', '.join(_LOADERS)}; "
            "fix: set one of these, 'auto' to choose by device"
        )
    if name != "auto":
        load(name)
    _forced = None if name == "auto" else name
    _choose.cache_clear()


def backend_for(q):
    """The backend for q's device, dtype and head dim; chosen and logged once per combination."""
    return _choose(q.device.type, q.dtype, q.shape[-1])


@functools.cache
def _choose(device, dtype, head_dim):
    names = [_forced] if _forced else _candidates(device, dtype, head_dim)
    refused = []
    for name in names:
        try:
            backend = load(name)
        except ValueError as error:
            if _forced:
                raise
            refused.append(str(error.__cause__))
            continue
        _logger.info("attention backend on %s, %s, head dim %d: %s", device, dtype, head_dim, name)
        if refused and name == "reference":
            _logger.warning("slow attention: the faster backends cannot run: %s", "; ".join(refused))
        return backend
    raise AssertionError("reference always loads")


def _candidates(device, dtype, head_dim):
    """Fastest first. The CUDA flash kernels take half precision and head dims up to 256 only."""
    if device == "cuda" and dtype in (torch.bfloat16, torch.float16) and head_dim <= 256:
        hopper = torch.cuda.get_device_capability() >= (9, 0) and torch.cuda.get_device_capability() < (10, 0)
        return (["flash_attn_3"] if hopper else []) + ["flash_attn_2", "aten_cuda", "triton", "reference"]
    if device == "cuda" and dtype == torch.float32 and head_dim <= 256:
        return ["triton", "reference"]
    if device == "cpu" and dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return ["aten_cpu", "reference"]
    return ["reference"]


@functools.cache
def load(name):
    """The backend of that name; ValueError where it cannot run."""
    try:
        return _LOADERS[name]()
    except (ImportError, AttributeError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"got attention backend {name!r}, which cannot run here ({error}); need the package that provides it; "
            "fix: install it or choose 'auto'"
        ) from error


def _checked(backend):
    """Refuse an installed package whose private interface has changed: one tiny case against the reference."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, do = torch.randn(4, 64, 1, 2, 64, device="cuda", generator=generator).bfloat16()
    o, lse = backend.forward(q, k, v, 0.125)
    expected = reference.backward(do, q, k, v, *reference.forward(q, k, v, 0.125), 0.125)
    for got, want in zip(backend.backward(do, q, k, v, o, lse, 0.125), expected, strict=True):
        if not (got.float() - want.float()).norm() <= 0.03 * want.float().norm():
            raise RuntimeError(f"{backend.name} disagrees with the reference: its interface is not the one known here")
    return backend


def _heads_first(*tensors):
    return [x.permute(1, 2, 0, 3) for x in tensors]  # [s, b, n, d] -> [b, n, s, d], a view


def _tokens_first(*tensors):
    return tuple(x.permute(2, 0, 1, 3) for x in tensors)


def _aten_cpu():
    forward_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def forward(q, k, v, scale):
        o, lse = forward_op(*_heads_first(q, k, v), scale=scale)
        return *_tokens_first(o), lse

    def backward(do, q, k, v, o, lse, scale):
        do, q, k, v, o = _heads_first(do, q, k, v, o)
        return _tokens_first(*backward_op(do, q, k, v, o, lse, 0.0, False, scale=scale))

    return Backend("aten_cpu", forward, backward)


def _aten_cuda():
    forward_op = torch.ops.aten._scaled_dot_product_flash_attention
    backward_op = torch.ops.aten._scaled_dot_product_flash_attention_backward

    def forward(q, k, v, scale):
        o, lse = forward_op(*_heads_first(*_pad_head_dim(q, k, v)), scale=scale)[:2]
        return *_tokens_first(o[..., : q.shape[-1]]), lse

    def backward(do, q, k, v, o, lse, scale):
        seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # read with dropout only
        padded = _heads_first(*_pad_head_dim(do, q, k, v, o))
        ends = None, None, q.shape[0], k.shape[0]
        grads = backward_op(*padded, lse.contiguous(), *ends, 0.0, False, seed, seed, scale=scale)
        return _tokens_first(*(x[..., : q.shape[-1]] for x in grads))

    return Backend("aten_cuda", forward, backward)


def _pad_head_dim(*tensors):
    """The CUDA kernels want a head dim that divides by 8; zeros change neither scores nor outputs."""
    missing = -tensors[0].shape[-1] % 8
    return [F.pad(x, (0, missing)) for x in tensors] if missing else tensors


def _batch_first(*tensors):
    return [x.transpose(0, 1) for x in tensors]  # [s, b, n, d] -> [b, s, n, d], the flash-attn packages' layout


def _flash_attn_2():
    from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_forward

    plain = {"dropout_p": 0.0, "causal": False, "softcap": 0.0, "alibi_slopes": None}
    plain |= {"window_size_left": -1, "window_size_right": -1}

    def forward(q, k, v, scale):
        padded = _batch_first(*_pad_head_dim(q, k, v))
        o, lse = _flash_attn_forward(*padded, softmax_scale=scale, return_softmax=False, **plain)[:2]
        return o[..., : q.shape[-1]].transpose(0, 1), lse

    def backward(do, q, k, v, o, lse, scale):
        do, q_pad, k_pad, v_pad, o = _batch_first(*_pad_head_dim(do, q, k, v, o))
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_pad, k_pad, v_pad)]
        _flash_attn_backward(do, q_pad, k_pad, v_pad, o, lse, *grads, softmax_scale=scale, deterministic=False, **plain)
        return tuple(x[..., : q.shape[-1]].transpose(0, 1) for x in grads)

    return _checked(Backend("flash_attn_2", forward, backward))


def _flash_attn_3():
    from flash_attn_interface import _flash_attn_backward, _flash_attn_forward

    def forward(q, k, v, scale):
        o, lse = _flash_attn_forward(*_batch_first(*_pad_head_dim(q, k, v)), softmax_scale=scale)[:2]
        return o[..., : q.shape[-1]].transpose(0, 1), lse

    def backward(do, q, k, v, o, lse, scale):
        do, q_pad, k_pad, v_pad, o = _batch_first(*_pad_head_dim(do, q, k, v, o))
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_pad, k_pad, v_pad))
        _flash_attn_backward(do, q_pad, k_pad, v_pad, o, lse, dq=dq, dk=dk, dv=dv, softmax_scale=scale)
        return tuple(x[..., : q.shape[-1]].transpose(0, 1) for x in (dq, dk, dv))

    return _checked(Backend("flash_attn_3", forward, backward))


def _triton():
    from rcm_kernels import launch
    from rcm_kernels.flash_attention import triton_impl

    launch.check_machine()
    return Backend("triton", triton_impl.forward, triton_impl.backward, accumulates=True)


_LOADERS = {
    "flash_attn_3": _flash_attn_3,
    "flash_attn_2": _flash_attn_2,
    "aten_cuda": _aten_cuda,
    "aten_cpu": _aten_cpu,
    "triton": _triton,
    "reference": lambda: Backend("reference", reference.forward, reference.backward),
}
