"""The fused kernels in Triton's interpreter against the reference in fp64. See test_fused.py."""

import os

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from rcm_kernels.fused import gated_residual, launcher, layer_norm_modulate, reference, rms_norm_rope
from tests.helpers import assert_close, relative_error
from tests.kernels.fused_cases import (
    CASES,
    EPS,
    check_forward_and_gradients,
    check_tangent,
    gradients,
    normal,
    reference_of,
    rotation,
    settings,
    wide,
)

assert os.environ.get("TRITON_INTERPRET") == "1", "run me with TRITON_INTERPRET=1"
# The interpreter rounds to bf16 towards zero.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Fewer programs than rows, so that each walks over several."""
    monkeypatch.setattr(launcher, "PROGRAMS", 4)


@pytest.mark.parametrize(
    ("s", "b", "d", "dtype"),
    [
        (1, 1, 66, torch.float32),
        (15, 2, 44, torch.float32),
        (77, 1, 17, torch.float32),
        (5, 2, 44, torch.bfloat16),
        (3, 2, 44, torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients(name, s, b, d, dtype):
    check_forward_and_gradients(name, s, b, d, dtype, rel=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("s", "b", "d", "dtype"),
    [(1, 1, 66, torch.float32), (15, 2, 17, torch.float32), (5, 2, 44, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("name", CASES)
def test_tangent(name, s, b, d, dtype):
    check_tangent(name, s, b, d, dtype, rel=TOLERANCE[dtype])


class SumOfTwo(torch.autograd.Function):
    """What this rank sees of an all-reduce over two: the totals of both, forward and backward."""

    @staticmethod
    def forward(ctx, local, total, d_total):
        ctx.save_for_backward(d_total)
        return total.clone()

    @staticmethod
    def backward(ctx, _):
        return ctx.saved_tensors[0].clone(), None, None


@pytest.mark.parametrize("rope", [True, False])
def test_heads_split_over_two_ranks(rope):
    """Sums in between of what each rank launches: forward, tangent and gradients are slices of the whole."""
    s, b, n, k = 7, 2, 3, 10
    x, dy, weight = normal(s, 2 * b, n, k, seed=1), normal(s, b, n, k, seed=2), normal(n, k, seed=3)
    turn = rotation(s, k) if rope else None
    options = {"eps": EPS, "num_features": n * k}
    wide_turn = turn.to(torch.complex128) if rope else None
    expected_dual = reference.jvp_of(reference.rms_norm_rope, x.double(), weight.double(), wide_turn, **options)
    leaves = [x[:, :b].double().requires_grad_(), weight.double().requires_grad_()]
    total = leaves[0].square().sum((-2, -1)).detach().requires_grad_()
    # the gradient through the total and the one beside it
    y = reference.rms_norm_rope(*leaves, wide_turn, total_SB=total, **options)
    _, d_weight, d_total = torch.autograd.grad(y, (*leaves, total), dy.double())
    (dx,) = torch.autograd.grad(reference.rms_norm_rope(*leaves, wide_turn, **options), leaves[:1], dy.double())
    primal, tangent = x.double().chunk(2, dim=1)
    dual_total = torch.stack([primal.square().sum((-2, -1)), (primal * tangent).sum((-2, -1))], -1).float()
    for heads in (slice(0, 1), slice(1, 3)):
        mine, w = x[:, :, heads], weight[heads]
        dual = rms_norm_rope.dual(mine, w, turn, sum_over_tp=lambda local: dual_total, **options)
        assert_close(f"dual, heads {heads}", expected_dual[:, :, heads], dual, rel=5e-6)

        def all_reduce(local):
            return SumOfTwo.apply(local, total.detach()[..., None].float(), d_total[..., None].float())

        got, grads = gradients(
            rms_norm_rope.plain,
            [mine[:, :b], w, *([turn] if rope else [])],
            dy[:, :, heads],
            sum_over_tp=all_reduce,
            **options,
        )
        assert_close(f"y, heads {heads}", expected_dual[:, :b, heads], got, rel=5e-6)
        assert_close(f"dx, heads {heads}", dx[:, :, heads], grads[0], rel=5e-6)
        assert_close(f"d_weight, heads {heads}", d_weight[heads], grads[1], rel=5e-6)


@pytest.mark.parametrize("name", ["layer_norm_modulate", "rms_norm"])
def test_hard_inputs_cost_no_more_than_in_pytorch(name):
    """A mean of 100 in x and in its tangent: the error in fp32 against the reference's own in fp32."""
    module, make = CASES[name]
    inputs, options = make(5, 2, 66, torch.float32)
    inputs[0] = inputs[0] + 100
    kernel_options, reference_options = settings(module, inputs, options)
    expected = reference.jvp_of(reference_of(module), *wide(inputs), **reference_options)
    plain = reference.jvp_of(reference_of(module), *inputs, **reference_options)
    got = module.dual(*inputs, **kernel_options)
    assert_close(name, expected, got, rel=max(2 * relative_error(expected, plain), 1e-6))


def test_a_row_must_fit_into_one_program():
    wide_row = torch.zeros(1, 1, 20000)
    with pytest.raises(ValueError, match="got 20000 features in one row; need at most 16384"):
        layer_norm_modulate.plain(wide_row, wide_row, wide_row, eps=EPS, dtype=torch.float32)


def test_vectors_that_samples_share():
    """[1, 1, d] for a batch of 2: the gradient is a sum over the samples too. [s, 1, d] is refused."""
    x, dy, one, two = (
        normal(3, 2, 10, seed=1),
        normal(3, 2, 10, seed=2),
        normal(1, 1, 10, seed=3),
        normal(1, 1, 10, seed=4),
    )
    options = {"eps": EPS}
    for module, inputs, mine in (
        (layer_norm_modulate, [x, one, two], {"dtype": torch.float32} | options),
        (gated_residual, [x, dy, one], {}),
    ):
        got = gradients(module.plain, inputs, dy, **mine)
        theirs = {} if module is gated_residual else options
        expected = gradients(reference_of(module), wide(inputs), dy.double(), **theirs)
        for ref, out in zip((expected[0], *expected[1]), (got[0], *got[1]), strict=True):
            assert_close(module.__name__, ref, out, rel=5e-6)
    with pytest.raises(ValueError, match=r"got a vector of shape \(3, 1, 10\)"):
        gated_residual.plain(x, x, x[:, :1])


def test_inside_a_checkpoint():
    """PyTorch's non-reentrant checkpoint, also with a sum over ranks whose graph the op keeps."""
    x, dy, weight, one = (
        normal(3, 2, 2, 6, seed=1),
        normal(3, 2, 12, seed=2),
        normal(2, 6, seed=3),
        normal(1, 2, 12, seed=4),
    )

    def block(x, weight, one):
        options = {"eps": EPS, "num_features": 12, "sum_over_tp": lambda local: local * 1.5}
        normed = rms_norm_rope.plain(x, weight, rotation(3, 6), **options).flatten(2)
        return gated_residual.plain(
            normed, layer_norm_modulate.plain(normed, one, one, eps=EPS, dtype=torch.float32), one
        )

    def checkpointed(*inputs):
        return checkpoint(block, *inputs, use_reentrant=False)

    expected, got = (gradients(function, [x, weight, one], dy) for function in (block, checkpointed))
    for ref, out in zip((expected[0], *expected[1]), (got[0], *got[1]), strict=True):
        assert_close("checkpointed", ref, out, rel=0)
