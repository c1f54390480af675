"""How two sets of feature vectors lie to each other, and how varied one is: pure functions, fp64.

Shapes: N, M vectors of two sets, F features, P prompts, S seeds of a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from rcm_megatron.errors import InputError

_ROWS = 1024
"""Of a matrix of distances that are held at once."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A generated set beside a reference set."""

    precision: float
    """Share of generated vectors within the reference's manifold."""
    recall: float
    """Share of reference vectors within the generated set's manifold."""
    density: float
    """How often the reference's manifold covers a generated vector, 1 if as often as its own; may be more."""
    coverage: float
    """Share of reference vectors with a generated one in their neighbourhood."""
    frechet: float
    """Squared Fréchet distance of the two Gaussians; 0 is best, and it is biased upwards for few vectors."""


def compare(generated_NF: Tensor, *, reference_MF: Tensor, k: int) -> Comparison:
    """All of `Comparison`, with the distance to the ``k``-th neighbour as radius, compared by strict <.

    Precision and recall: Kynkäänniemi et al. 2019 (arXiv 1904.06991), Eqs. 1 and 2. Density and coverage: Naeem et al. 2020
    (arXiv 2002.09797), Eqs. 4 and 6. InputError where a set has no k-th neighbour.
    """
    reference_radius_M = neighbour_radius(reference_MF, k=k, name="the reference set")
    generated_radius_N = neighbour_radius(generated_NF, k=k, name="the generated set")
    covering_N, covered_M, recalled_M = [], [], []
    for rows in _parts(len(generated_NF)):
        inside_NM = _distances(generated_NF[rows], reference_MF) < reference_radius_M
        covering_N.append(inside_NM.sum(dim=1))
    for rows in _parts(len(reference_MF)):
        distance_MN = _distances(reference_MF[rows], generated_NF)
        recalled_M.append((distance_MN < generated_radius_N).any(dim=1))
        covered_M.append(distance_MN.amin(dim=1) < reference_radius_M[rows])
    covering = torch.cat(covering_N).double()
    return Comparison(
        precision=float((covering > 0).double().mean()),
        recall=float(torch.cat(recalled_M).double().mean()),
        density=float(covering.mean() / k),
        coverage=float(torch.cat(covered_M).double().mean()),
        frechet=frechet_distance(generated_NF, reference_MF),
    )


def neighbour_radius(set_NF: Tensor, *, k: int, name: str) -> Tensor:
    """Distance [N] of each vector to its k-th neighbour in the same set, itself left out. InputError for fewer than k + 1 vectors."""
    if k < 1:
        raise InputError(f"got k={k}, need at least 1; fix: --k 5")
    if len(set_NF) <= k:
        most = f", or lower it with --k {len(set_NF) - 1}" if len(set_NF) > 1 else ""
        raise InputError(
            f"got {len(set_NF)} video{'s' * (len(set_NF) != 1)} in {name}, need at least k + 1 = {k + 1} for k={k} neighbours; "
            f"fix: give more{most}"
        )
    radii = []
    for rows in _parts(len(set_NF)):
        distance_NN = _distances(set_NF[rows], set_NF)
        distance_NN[torch.arange(len(distance_NN)), torch.arange(rows.start, rows.stop)] = torch.inf
        radii.append(distance_NN.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def frechet_distance(a_NF: Tensor, b_MF: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)) of the fitted Gaussians, FID's (arXiv 1706.08500), Eq. 6; covariances over N - 1.

    With A = Ra^T Ra and B = Rb^T Rb, the eigenvalues of A B are the squared singular values of Ra Rb^T: no root of a matrix is needed, and
    fewer vectors than features are no special case. InputError for a set of one.
    """
    for name, vectors in {"generated": a_NF, "reference": b_MF}.items():
        if len(vectors) < 2:
            raise InputError(
                f"got {len(vectors)} video in the {name} set, need at least 2 for a covariance; fix: give more"
            )
    (mean_a, root_a), (mean_b, root_b) = _gaussian(a_NF), _gaussian(b_MF)
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    value = (mean_a - mean_b).square().sum() + root_a.square().sum() + root_b.square().sum() - 2.0 * cross
    # rounding alone can make it negative
    return max(0.0, float(value))


def _gaussian(set_NF: Tensor) -> tuple[Tensor, Tensor]:
    """(mean [F], R) with covariance R^T R."""
    set_NF = set_NF.double()
    mean_F = set_NF.mean(dim=0)
    return mean_F, torch.linalg.qr((set_NF - mean_F) / (len(set_NF) - 1) ** 0.5, mode="r").R


def vendi_score(set_NF: Tensor) -> float:
    """exp of the entropy of the eigenvalues of K/n, K the cosine similarities: the effective number of different vectors, 1 to n.

    Friedman and Dieng 2022 (arXiv 2210.02410), Eq. 2. InputError for a vector of length 0, which has no direction.
    """
    lengths_N = set_NF.double().norm(dim=1)
    if not bool((lengths_N > 0).all()):
        raise InputError(
            f"got features of length 0 (video {int(lengths_N.argmin())}), need a direction for the Vendi score; fix: take other --features"
        )
    unit_NF = set_NF.double() / lengths_N[:, None]
    # the squared singular values of the unit vectors are the eigenvalues of K
    eigenvalues = torch.linalg.svdvals(unit_NF).square() / len(unit_NF)
    eigenvalues = eigenvalues[eigenvalues > 0]
    return float(torch.exp(-(eigenvalues * eigenvalues.log()).sum()))


def spread(seeds_PSF: list[Tensor]) -> Tensor:
    """Mean distance [P] between two vectors of one prompt; ``seeds_PSF``: the vectors [S, F] of each prompt, S at least 2."""
    return torch.stack([functional.pdist(seeds_SF.double()).mean() for seeds_SF in seeds_PSF])


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over prompts, and the interval that its bootstrap gives."""

    value: float
    low: float
    high: float


def bootstrap_ratio(
    spread_P: Tensor, *, reference_P: Tensor | None = None, rounds: int = 1000, level: float = 0.95, seed: int = 0
) -> Estimate:
    """mean(``spread_P``), over mean(``reference_P``) of the same prompts if given, with a percentile bootstrap over prompts.

    The same prompts are drawn for both, so that what a prompt does to both cancels. A reference of 0 gives NaN.
    """
    reference_P = torch.ones_like(spread_P) if reference_P is None else reference_P
    drawn_RP = torch.randint(len(spread_P), (rounds, len(spread_P)), generator=torch.Generator().manual_seed(seed))
    ratios_R = spread_P[drawn_RP].mean(dim=1) / reference_P[drawn_RP].mean(dim=1)
    tail = (1.0 - level) / 2
    low, high = ratios_R.quantile(torch.tensor([tail, 1.0 - tail], dtype=ratios_R.dtype)).tolist()
    return Estimate(value=float(spread_P.mean() / reference_P.mean()), low=low, high=high)


def _distances(a_NF: Tensor, b_MF: Tensor) -> Tensor:
    """[N, M]. Not by |a|^2 - 2ab + |b|^2, which is not 0 for equal vectors."""
    return torch.cdist(a_NF.double(), b_MF.double(), compute_mode="donot_use_mm_for_euclid_dist")


def _parts(count: int) -> Iterator[slice]:
    return (slice(start, min(start + _ROWS, count)) for start in range(0, count, _ROWS))
