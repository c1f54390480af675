"""Metrics of sets of features against values by hand, brute force, closed forms and SciPy."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch

from rcm_megatron.errors import InputError
from rcm_megatron.evaluation.features import VideoSet
from rcm_megatron.evaluation.report import rows_of, table
from rcm_megatron.evaluation.sets import (
    bootstrap_ratio,
    compare,
    frechet_distance,
    neighbour_radius,
    spread,
    vendi_score,
)


def line(*places):
    """Points on a line, as features [N, 1]."""
    return torch.tensor(places, dtype=torch.float64)[:, None]


def random_set(count, features, seed, scale=1.0, shift=0.0):
    return scale * torch.randn(count, features, generator=torch.Generator().manual_seed(seed)).double() + shift


def by_definition(generated, reference, k):
    """The four figures, by loops over Python lists: an independent spelling of the papers' formulas."""
    generated, reference = generated.tolist(), reference.tolist()

    def radius(points, i):
        return sorted(math.dist(points[i], other) for j, other in enumerate(points) if j != i)[k - 1]

    real_radii = [radius(reference, i) for i in range(len(reference))]
    fake_radii = [radius(generated, i) for i in range(len(generated))]
    pairs = [[math.dist(g, r) for r in reference] for g in generated]
    inside = [[distance < real_radii[j] for j, distance in enumerate(row)] for row in pairs]
    columns = list(zip(*pairs, strict=True))
    return {
        "precision": sum(any(row) for row in inside) / len(generated),
        "recall": sum(any(d < r for d, r in zip(column, fake_radii, strict=True)) for column in columns)
        / len(reference),
        "density": sum(map(sum, inside)) / (k * len(generated)),
        "coverage": sum(min(column) < real_radii[j] for j, column in enumerate(columns)) / len(reference),
    }


def test_by_hand_on_a_line():
    """Real 0, 1, 3, 7, k = 1: radii 1, 1, 2, 4. Generated 0.5, 2, 12: radii 1.5, 1.5, 10."""
    result = compare(line(0.5, 2.0, 12.0), reference_MF=line(0.0, 1.0, 3.0, 7.0), k=1)
    # 0.5 lies in the balls of 0 and 1; 2 in that of 3 alone (|2 - 1| = 1 is not < 1, |2 - 7| = 5); 12 in none (|12 - 7| = 5)
    assert (result.precision, result.density) == (2 / 3, 3 / 3)
    # 0 and 1 within 1.5 of 0.5; 3 within 1.5 of 2; 7 within 10 of 12
    assert result.recall == 1.0
    # nearest generated at 0.5 < 1, 0.5 < 1, 1 < 2, and 5, which is not < 4
    assert result.coverage == 3 / 4
    assert neighbour_radius(line(0.0, 1.0, 3.0, 7.0), k=2, name="x").tolist() == [3.0, 2.0, 3.0, 6.0]


def test_a_copied_set_is_perfect_and_a_set_far_away_is_nothing():
    real = random_set(40, 3, seed=0)
    same = compare(real.clone(), reference_MF=real, k=5)
    assert (same.precision, same.recall, same.coverage) == (1.0, 1.0, 1.0)
    # each point lies in its own ball, and strictly in that of every x whose 5th neighbour is farther: 5 of 5 on average by counting
    # pairs (each x has 4 others strictly nearer than its 5th, and itself)
    assert same.density == pytest.approx(1.0) and same.frechet == pytest.approx(0.0, abs=1e-9)
    far = compare(real + 1000.0, reference_MF=real, k=5)
    assert (far.precision, far.recall, far.density, far.coverage) == (0.0, 0.0, 0.0, 0.0)
    assert far.frechet == pytest.approx(3 * 1000.0**2, rel=1e-6)


def test_a_collapsed_set_is_precise_and_recalls_nothing():
    """All equal: the radius within the set is 0, and a strict < holds for nothing."""
    real = random_set(40, 3, seed=0)
    collapsed = real[:1].expand(30, -1).clone()
    result = compare(collapsed, reference_MF=real, k=5)
    assert result.precision == 1.0 and result.recall == 0.0
    inside = int((neighbour_radius(real, k=5, name="x") > (real - real[0]).norm(dim=1)).sum())
    assert result.coverage == inside / 40 and result.density == pytest.approx(inside / 5)
    assert vendi_score(collapsed) == pytest.approx(1.0) and float(spread([collapsed])) == 0.0


def test_a_half_of_two_clusters_is_half_recalled():
    real = torch.cat([random_set(30, 2, seed=1), random_set(30, 2, seed=2, shift=500.0)])
    result = compare(real[:30].clone(), reference_MF=real, k=5)
    assert (result.precision, result.recall, result.coverage) == (1.0, 0.5, 0.5)


@pytest.mark.parametrize(("count", "others", "features", "k"), [(23, 17, 3, 5), (9, 31, 1, 2), (1100, 40, 2, 3)])
def test_against_the_definitions_spelt_out(count, others, features, k):
    """More rows than are compared at once, too; equal vectors among them."""
    generated, reference = (
        random_set(count, features, seed=3, scale=1.3),
        random_set(others, features, seed=4, shift=0.2),
    )
    generated[5:8] = reference[:3]
    generated[8] = generated[7]
    result = compare(generated, reference_MF=reference, k=k)
    for name, value in by_definition(generated, reference, k).items():
        assert getattr(result, name) == pytest.approx(value, abs=1e-12), name


def judged_distance(a_NF, b_MF):
    """By tr (A B)^(1/2) = the sum of the roots of the eigenvalues of A^(1/2) B A^(1/2), which is symmetric."""
    a_NF, b_MF = a_NF.double().numpy(), b_MF.double().numpy()
    mean_gap = float(np.square(a_NF.mean(0) - b_MF.mean(0)).sum())
    cov_a, cov_b = np.cov(a_NF, rowvar=False), np.cov(b_MF, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(min=0.0)).sum()
    return mean_gap + float(np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross)


def test_frechet_of_gaussians_is_the_closed_form():
    """Sets whose sample covariances commute: sum of (difference of the roots) squared, plus the means'."""
    # columns of a Hadamard matrix have mean 0 and are orthogonal: covariances are diagonal
    base = torch.tensor(scipy.linalg.hadamard(8)[:, 1:4], dtype=torch.float64) * math.sqrt(7 / 8)
    a, b = base * torch.tensor([1.0, 2.0, 0.0]), base * torch.tensor([3.0, 0.5, 1.0]) + torch.tensor([1.0, 0.0, -2.0])
    expected = (1 - 3) ** 2 + (2 - 0.5) ** 2 + (0 - 1) ** 2 + 1 + 4
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(line(0.0, 2.0), line(5.0, 5.0)) == pytest.approx(4**2 + 2.0)


@pytest.mark.parametrize(("n", "m", "features"), [(50, 70, 6), (12, 70, 30), (12, 9, 30)])
def test_frechet_against_scipys_root_of_a_matrix(n, m, features):
    """Fewer vectors than features, too, where FID's usual root is ill-conditioned."""
    a, b = random_set(n, features, seed=5, scale=2.0), random_set(m, features, seed=6, shift=0.7)
    cov_a, cov_b = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b + 1e-13 * np.eye(features)).real
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(a, b) == pytest.approx(judged_distance(a, b), rel=1e-6)


def test_vendi_counts_different_vectors():
    directions = torch.eye(4)
    assert vendi_score(directions) == pytest.approx(4.0)
    assert vendi_score(directions[[0, 0, 1, 1]] * 7.0) == pytest.approx(2.0)
    # K = [[1, c], [c, 1]]/2 has eigenvalues (1 ± c)/2
    c = math.cos(1.0)
    entropy = -sum(x * math.log(x) for x in ((1 + c) / 2, (1 - c) / 2))
    assert vendi_score(torch.tensor([[1.0, 0.0], [c, math.sin(1.0)]])) == pytest.approx(math.exp(entropy), rel=1e-6)
    with pytest.raises(InputError, match="length 0 .video 1.*need a direction.*fix"):
        vendi_score(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))


def test_spread_and_its_ratio():
    """Distances 3, 4, 5 of a right triangle; a pair at 2."""
    triangle, pair = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]]), torch.tensor([[1.0, 1.0], [1.0, 3.0]])
    assert spread([triangle, pair]).tolist() == [4.0, 2.0]
    whole = spread([triangle, pair])
    half = bootstrap_ratio(whole / 2, reference_P=whole)
    # a ratio that is the same for every prompt has no spread: both are drawn together
    assert (half.value, half.low, half.high) == pytest.approx((0.5, 0.5, 0.5))
    mean = bootstrap_ratio(whole)
    assert mean.value == 3.0 and (mean.low, mean.high) == (2.0, 4.0)


def test_the_interval_is_that_of_the_mean():
    values = random_set(200, 1, seed=8)[:, 0] + 10.0
    estimate, error = bootstrap_ratio(values), float(values.std()) / math.sqrt(200)
    assert estimate.low == pytest.approx(estimate.value - 1.96 * error, abs=0.3 * error)
    assert estimate.high == pytest.approx(estimate.value + 1.96 * error, abs=0.3 * error)
    assert estimate == bootstrap_ratio(values), "seeded"


def videos(name, features, prompts):
    return VideoSet(name=name, features_NF=features.float(), prompts=prompts)


def test_rows_compare_prompts_that_both_have():
    prompts = tuple(itertools.chain.from_iterable([name] * 4 for name in "abc"))
    teacher = random_set(12, 5, seed=9)
    centres = teacher.unflatten(0, (3, 4)).mean(dim=1).repeat_interleave(4, dim=0)
    student = centres + 0.25 * (teacher - centres)
    rows = rows_of(
        [
            videos("teacher", teacher, prompts),
            videos("student", student[:8], prompts[:8]),
            videos("other", student, ("",) * 12),
        ],
        reference=None,
        k=3,
    )
    assert rows[0].compared is None and rows[0].diversity.value == 1.0
    assert rows[1].diversity.value == pytest.approx(0.25, rel=1e-5) and rows[1].prompts == 2
    silent = rows_of([videos("a", teacher, prompts), videos("b", 0.0 * teacher, prompts)], reference=None, k=3)[1]
    assert (silent.vendi, silent.vendi_all, silent.diversity.value) == (None, None, 0.0)
    assert rows[2].diversity is None and rows[2].spread is None and rows[2].vendi is None
    assert "0.25 to 0.25" in table(rows) and "saturation" not in table(rows)
    with pytest.raises(InputError, match="5 features of teacher and 2 of student, need those of one network; fix"):
        rows_of([videos("teacher", teacher, prompts), videos("student", student[:, :2], prompts)], reference=None, k=3)


@pytest.mark.parametrize(
    ("count", "k", "message"),
    [
        (1, 5, r"got 1 video in the reference set, need at least k \+ 1 = 6 for k=5 neighbours; fix: give more$"),
        (
            4,
            5,
            r"got 4 videos in the reference set, need at least k \+ 1 = 6 .* fix: give more, or lower it with --k 3",
        ),
        (4, 0, "got k=0, need at least 1; fix"),
    ],
)
def test_too_few_vectors_are_refused(count, k, message):
    with pytest.raises(InputError, match=message):
        compare(random_set(9, 2, seed=0), reference_MF=random_set(count, 2, seed=1), k=k)
