"""Inputs for attention_jvp that the interpreter's tests and the GPU's share, and the same-precision reference."""

import torch

NAMES = ("o", "to", "lse", "mu")


def make_inputs(s, keys, *, b=1, n=2, d=16, seed=0, dtype=torch.float32, device="cpu"):
    """q, k, v, tq, tk, tv, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (s, keys, keys, s, keys, keys)
    return [torch.randn(length, b, n, d, generator=generator).to(device, dtype) for length in lengths]


def rows_far_apart(path, count, *, tensors, d=16):
    """`tensors` fp16 tensors [count, 1, 1, d] with rows 2^23 elements apart, in a sparse file: the last begins past element 2^31."""
    assert count * 2**23 > 2**31
    rows = torch.from_file(str(path), shared=True, size=count * 2**23, dtype=torch.float16).view(count, 1, 1, 2**23)
    generator, found = torch.Generator().manual_seed(0), []
    for i in range(tensors):
        found.append(rows[..., i * d : (i + 1) * d])
        found[-1].copy_(torch.randn(count, 1, 1, d, generator=generator))
    return found


def hard_inputs(kind, *, keys=256, d=64, dtype=torch.float32, device="cpu"):
    """Inputs on which a careless kernel loses its digits; kinds as in `HARD`."""
    q, k, v, tq, tk, tv = make_inputs(63, keys, d=d)
    if kind.startswith("sharp"):  # logits x16
        q = q * 16
    if kind in ("common_mode", "sharp_common_mode"):  # tS of all keys of a row shifted by about 100 * |q| * scale
        tk = tk + 100
    if kind in ("drift", "sharp_drift"):  # by 0 for the first key, by as much for the last
        tk = tk + torch.linspace(0, 100, keys).view(-1, 1, 1, 1)
    if kind == "one_hot":  # row i sees key i alone
        k[:63] = 30 * torch.nn.functional.normalize(k[:63], dim=-1)
        q = k[:63].clone()
    if kind == "uniform":  # all keys weigh the same, values with a mean
        q, v, tv = q * 0.01, v + 1, tv + 1
    return [x.to(device, dtype) for x in (q, k, v, tq, tk, tv)]


HARD = ("plain", "sharp", "common_mode", "sharp_common_mode", "drift", "sharp_drift", "one_hot", "uniform")


def same_precision(q, k, v, tq, tk, tv):
    """Attention and its tangent in PyTorch with the precision of matrix units: factors in the inputs' type, all else fp32.

    Everything is materialised, and the tangent of the weights is centred before it is rounded: as good as this type gets.
    """
    dtype, scale = q.dtype, q.shape[-1] ** -0.5
    q, k, v, tq, tk, tv = (x.float() for x in (q, k, v, tq, tk, tv))
    S = torch.einsum("sbnd,lbnd->bnsl", q, k) * scale
    tS = (torch.einsum("sbnd,lbnd->bnsl", tq, k) + torch.einsum("sbnd,lbnd->bnsl", q, tk)) * scale
    P = S.softmax(-1)
    mu = (P * tS).sum(-1)
    P_rounded, tP_rounded = (x.to(dtype).float() for x in (P, P * (tS - mu.unsqueeze(-1))))
    o = torch.einsum("bnsl,lbnd->sbnd", P_rounded, v)
    to = torch.einsum("bnsl,lbnd->sbnd", P_rounded, tv) + torch.einsum("bnsl,lbnd->sbnd", tP_rounded, v)
    return o, to, S.logsumexp(-1), mu
