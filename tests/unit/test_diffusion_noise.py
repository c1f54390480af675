"""Draws depend on (seed, iteration, sample, purpose) and on nothing else."""

import torch

from rcm_megatron.diffusion.noise import SeededDraws

SHAPE = (2, 3, 5)


def test_independent_of_the_grouping_of_the_batch():
    whole = SeededDraws(7, 3, [40, 41, 42, 43])
    parts = [SeededDraws(7, 3, [42, 40]), SeededDraws(7, 3, [43]), SeededDraws(7, 3, [41])]
    order = [2, 0, 3, 1]
    for draw in (
        lambda draws: draws.normal("noise", SHAPE),
        lambda draws: draws.uniform("score_time"),
        lambda draws: draws.normal_scalar("time"),
    ):
        assert torch.equal(torch.cat([draw(part) for part in parts]), draw(whole)[order])


def test_repeatable_in_any_order_and_without_the_global_generator():
    draws = SeededDraws(7, 3, [1, 2])
    first = draws.normal("noise", SHAPE)
    draws.uniform("dcm_u")
    torch.manual_seed(0)
    torch.randn(9)
    assert torch.equal(first, draws.normal("noise", SHAPE))


def test_every_part_of_the_key_matters():
    base = SeededDraws(7, 3, [1]).normal("noise", SHAPE)
    others = [
        SeededDraws(8, 3, [1]).normal("noise", SHAPE),
        SeededDraws(7, 4, [1]).normal("noise", SHAPE),
        SeededDraws(7, 3, [2]).normal("noise", SHAPE),
        SeededDraws(7, 3, [1]).normal("score_noise", SHAPE),
        SeededDraws(7, 31, [1]).normal("noise", SHAPE),
    ]
    for other in others:
        assert not torch.equal(base, other)


def test_shapes_and_dtypes():
    draws = SeededDraws(0, 0, range(5, 8))
    assert draws.batch_size == 3
    assert draws.normal("noise", SHAPE).shape == (3, *SHAPE)
    assert draws.uniform("a").shape == draws.normal_scalar("a").shape == (3,)
    assert {draws.normal("n", SHAPE).dtype, draws.uniform("u").dtype, draws.normal_scalar("z").dtype} == {torch.float32}


def test_distributions():
    draws = SeededDraws(1, 0, range(4000))
    u, z = draws.uniform("u"), draws.normal_scalar("z")
    assert 0 <= u.min() < 0.01
    assert 0.99 < u.max() < 1
    assert abs(u.mean() - 0.5) < 0.02
    assert abs(z.mean()) < 0.06
    assert abs(z.std() - 1) < 0.05
    assert abs(torch.corrcoef(torch.stack([u, z]))[0, 1]) < 0.06
