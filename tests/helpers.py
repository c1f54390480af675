"""What the tests share: assertions, and where the golden files are."""

from pathlib import Path

import torch

GOLDEN = Path(__file__).parent / "golden"
"""Numbers of the official implementation; see tests/golden/README.md."""


def relative_error(ref, out):
    """‖out − ref‖ / ‖ref‖ (Frobenius, in fp64); ‖out‖ itself where ref is zero."""
    ref, out = ref.detach().double(), out.detach().double()
    scale = ref.norm()
    return float((out - ref).norm() / scale) if scale > 0 else float(out.norm())


def worst_row_error(ref, out):
    """Largest ‖out_row − ref_row‖ over rows (last dimension), in units of the root-mean-square row norm of ref."""
    ref, out = ref.detach().double(), out.detach().double()
    scale = ref.norm(dim=-1).square().mean().sqrt()
    worst = (out - ref).norm(dim=-1).max()
    return float(worst / scale) if scale > 0 else float(worst)


def assert_close(name, ref, out, *, rel, row=None):
    """`out` equals `ref` to `rel` in relative Frobenius error and, if `row` is given, each row to `row`; no NaN or inf.

    Shapes must be equal; dtypes may differ. The failure names the tensor and both errors.
    """
    assert ref.shape == out.shape, f"{name}: shape {tuple(out.shape)}, reference {tuple(ref.shape)}"
    assert bool(torch.isfinite(ref).all()), f"{name}: reference is not finite"
    bad = int((~torch.isfinite(out)).sum())
    assert bad == 0, f"{name}: {bad} of {out.numel()} elements are not finite"
    error = relative_error(ref, out)
    assert error <= rel, f"{name}: relative error {error:.3e} > {rel:.1e} (norm of reference {float(ref.norm()):.3e})"
    if row is not None:
        worst = worst_row_error(ref, out)
        assert worst <= row, f"{name}: worst row {worst:.3e} > {row:.1e} (relative error {error:.3e})"


def dense_attention(q, k, v, *, valid_keys=None, scale=None):
    """Softmax attention by its definition, all scores at once: q [s, b, n, d], k, v [l, b, n, d] -> [s, b, n, d]."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = k[:valid_keys], v[:valid_keys]
    weights = torch.einsum("sbnd,lbnd->bnsl", q, k).mul(scale).softmax(-1)
    return torch.einsum("bnsl,lbnd->sbnd", weights, v)
