"""What centring and the rounded mu are worth in bf16: the Triton kernel's arithmetic in fp32, rounded where the kernel rounds.

    OMP_NUM_THREADS=1 PYTHONPATH=.:kernels python tools/emulate_jvp_rounding.py

Prints the relative error of `to` against fp64 per kind of input, as a Markdown table (256 queries, 1,024 keys, head dim 128).
"""

import torch
from torch import Tensor

QUERIES, KEYS, DIM, TILE = 256, 1024, 128, 64


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def inputs(kind: str) -> list[Tensor]:
    """q, k, v, tq, tk, tv: [rows, DIM], exact in bf16."""
    generator = torch.Generator().manual_seed(0)
    q, tq = torch.randn(2, QUERIES, DIM, generator=generator)
    k, v, tk, tv = torch.randn(4, KEYS, DIM, generator=generator)
    if kind in ("logits x16", "both"):
        q = q * 16
    if kind in ("tk + 100", "both"):
        tk = tk + 100
    if kind == "one-hot rows":
        k[:QUERIES] = 30 * torch.nn.functional.normalize(k[:QUERIES], dim=-1)
        q = k[:QUERIES].clone()
    if kind == "tk + 0..100":
        tk = tk + torch.linspace(0, 100, KEYS)[:, None]
    return [rounded(x) for x in (q, k, v, tq, tk, tv)]


def materialised(q: Tensor, k: Tensor, v: Tensor, tq: Tensor, tk: Tensor, tv: Tensor, *, rounding=rounded) -> Tensor:
    """`to` with all weights at once, their tangent centred before it is rounded."""
    S, tS = (x * DIM**-0.5 for x in (q @ k.T, tq @ k.T + q @ tk.T))
    P = S.softmax(-1)
    mu = (P * tS).sum(-1, keepdim=True)
    return rounding(P) @ tv + rounding(P * (tS - mu)) @ v


def tiled(
    q: Tensor, k: Tensor, v: Tensor, tq: Tensor, tk: Tensor, tv: Tensor, *, centring: bool, rounded_mu: bool
) -> Tensor:
    """`to` as the kernel computes it, with or without its two measures."""
    peak, total, mu = torch.full((QUERIES, 1), -torch.inf), torch.zeros(QUERIES, 1), torch.zeros(QUERIES, 1)
    acc_o, acc_to = torch.zeros(2, QUERIES, DIM)
    sample = slice(None, None, KEYS // TILE)
    centre = DIM**-0.5 * (tq @ k[sample].T + q @ tk[sample].T).mean(-1, keepdim=True) * centring
    for start in range(0, KEYS, TILE):
        k_tile, v_tile, tk_tile, tv_tile = (x[start : start + TILE] for x in (k, v, tk, tv))
        S, tS = (x * DIM**-0.5 for x in (q @ k_tile.T, tq @ k_tile.T + q @ tk_tile.T))
        new_peak = torch.maximum(peak, S.amax(-1, keepdim=True))
        P, decay = torch.exp(S - new_peak), torch.exp(peak - new_peak)
        PtS = P * (tS - centre)
        total = total * decay + P.sum(-1, keepdim=True)
        mu = mu * decay + (rounded(PtS) if rounded_mu else PtS).sum(-1, keepdim=True)
        acc_o = acc_o * decay + rounded(P) @ v_tile
        acc_to = acc_to * decay + rounded(PtS) @ v_tile + rounded(P) @ tv_tile
        peak = new_peak
    return acc_to / total - mu / total * (acc_o / total)


def main() -> None:
    """Print the table."""
    print("| inputs | neither | centring | centring and rounded mu (shipped) | PyTorch, materialised, centred |")
    print("|---|---|---|---|---|")
    for kind in ("normal", "logits x16", "tk + 100", "both", "one-hot rows", "tk + 0..100"):
        tensors = inputs(kind)
        exact = materialised(*(x.double() for x in tensors), rounding=lambda x: x)
        results = [tiled(*tensors, centring=c, rounded_mu=r) for c, r in ((False, False), (True, False), (True, True))]
        errors = [float((x.double() - exact).norm() / exact.norm()) for x in (*results, materialised(*tensors))]
        print(f"| {kind} | " + " | ".join(f"{error:.1e}" for error in errors) + " |")


if __name__ == "__main__":
    main()
