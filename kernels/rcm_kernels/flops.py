"""FLOPs of a launch: its matrix products, two a multiply-add, of every query with every key that exists. Import it where Triton is."""

from __future__ import annotations

from rcm_kernels.flash_attention import triton_impl as plain
from rcm_kernels.flash_attention_jvp import triton_impl as jvp
from rcm_kernels.launch import Launch

_PLAIN_FORWARD = 2
"""Products [queries, head dim, keys] of the kernel: q k and P v."""
_DQ, _DKDV = 3, 4
"""Scores and do v are computed again in each of the two; beyond them dS k, and dS q and P do."""


def flops_of(launch: Launch) -> int:
    """Of the attention kernels; others multiply no matrices: 0. Masks by chunk are not taken into account."""
    kernel, _, arguments, meta = launch
    if kernel not in (plain.forward_kernel, plain.backward_kernel, jvp.forward_kernel):
        return 0
    given = dict(zip(kernel.arg_names, arguments, strict=False)) | meta
    return 2 * _products(kernel, given) * given["batch"] * given["heads"] * _pairs(kernel, given) * given["HEAD_DIM"]


def _products(kernel: object, given: dict) -> int:
    if kernel is jvp.forward_kernel:
        return 6 if given["HAS_TK"] else 4
    if kernel is plain.forward_kernel:
        return _PLAIN_FORWARD
    return _DKDV if given["KEYS_STAY"] else _DQ


def _pairs(kernel: object, given: dict) -> int:
    """Queries times keys."""
    names = ("num_stay", "num_pass") if kernel is plain.backward_kernel else ("num_queries", "num_keys")
    return given[names[0]] * given[names[1]]
