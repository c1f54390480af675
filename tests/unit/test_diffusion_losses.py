"""Losses by independent formulas, their gradients, NaN masks and normalisers; in video and in token layout."""

import math

import pytest
import torch

from rcm_megatron.diffusion import losses, trigflow
from tests.helpers import assert_close

BATCH = 3
LAYOUTS = {"video": ((BATCH, 2, 3, 2, 5), 0), "tokens": ((7, BATCH, 5), 1)}


class Layout:
    """Random fp64 data of one layout, with times that broadcast."""

    def __init__(self, shape, batch_dim):
        self.shape, self.batch_dim = shape, batch_dim
        self.generator = torch.Generator().manual_seed(11)
        self.sum = losses.batch_sum(batch_dim)
        self.time_shape = [BATCH if dim == batch_dim else 1 for dim in range(len(shape))]
        self.t = torch.tensor([0.2, 0.9, 1.5], dtype=torch.float64).view(self.time_shape)

    def randn(self):
        return torch.randn(self.shape, generator=self.generator, dtype=torch.float64)

    def rows(self, x):
        """`[b, elements]`."""
        return x.movedim(self.batch_dim, 0).flatten(1)


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return Layout(*LAYOUTS[request.param])


def scm_inputs(layout):
    return {name: layout.randn() for name in ("F_student", "F_teacher", "dF", "xt")} | {"t": layout.t}


@pytest.mark.parametrize("scale_jvp", [False, True])
@pytest.mark.parametrize("r", [0.0, 0.35, 1.0])
def test_scm_target_sample_by_sample(layout, r, scale_jvp):
    """Both warm-up variants, written out a sample at a time with scalar times."""
    inputs = scm_inputs(layout)
    g, nan_mask, tangent_norm = losses.scm_tangent_target(
        **inputs, warmup_ratio=r, scale_jvp_by_warmup=scale_jvp, sum_per_sample=layout.sum
    )
    assert not nan_mask.any()
    rows = {name: layout.rows(x) for name, x in inputs.items() if name != "t"}
    for b, t in enumerate(layout.t.flatten().tolist()):
        F, F_teacher, dF, xt = (rows[name][b] for name in ("F_student", "F_teacher", "dF", "xt"))
        c, s = math.cos(t), math.sin(t)
        expected = -c * math.sqrt(1 - (r * s) ** 2) * (F - F_teacher) - r * c * s * xt - (r if scale_jvp else 1) * dF
        assert tangent_norm.flatten()[b].item() == pytest.approx(expected.norm().item(), rel=1e-13)
        assert_close(f"g[{b}]", expected / (expected.norm() + 0.1), layout.rows(g)[b], rel=1e-13)


def test_full_warmup_target_is_cos_times_the_consistency_tangent(layout):
    """At r = 1, g = -cos df/dt before the normalisation, f = cos xt - sin F along dx/dt = F_teacher. sCM Eq. 6.

    F(x, t) = A x + B t with scalars, so that dF/dt = A F_teacher + B by hand.
    """
    A, B = 0.6, -1.3
    xt, F_teacher, t = layout.randn(), layout.randn(), layout.t

    def f(tau):
        x = xt + tau * F_teacher
        return torch.cos(t + tau) * x - torch.sin(t + tau) * (A * x + B * (t + tau))

    df_dt = torch.func.jvp(f, (torch.zeros((), dtype=torch.float64),), (torch.ones((), dtype=torch.float64),))[1]
    t_xt, t_t = losses.tangent_seed(F_teacher, t)
    dF = A * t_xt + B * t_t
    g = losses.scm_tangent(A * xt + B * t, F_teacher, dF, xt, t, warmup_ratio=1.0)
    assert_close("g", t.cos() * df_dt, g, rel=1e-12)


def test_scm_loss_and_its_gradient(layout):
    F = layout.randn().float().requires_grad_()
    g = layout.randn()
    loss = 100.0 * losses.scm_loss(F, F, g)
    loss.sum().backward()
    assert_close("loss", 100 * g**2, loss, rel=1e-12)
    assert_close("gradient", -200 * g, F.grad, rel=1e-6)


@pytest.mark.parametrize("poisoned", ["dF", "F_student", "F_teacher", "xt"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_sample_is_masked_and_marked(layout, poisoned, value):
    inputs = scm_inputs(layout)
    clean = losses.scm_tangent_target(**inputs, warmup_ratio=1.0, sum_per_sample=layout.sum)
    inputs[poisoned].select(layout.batch_dim, 1)[1] = value
    g, nan_mask, norm = losses.scm_tangent_target(**inputs, warmup_ratio=1.0, sum_per_sample=layout.sum)
    assert nan_mask.flatten().tolist() == [False, True, False]
    assert nan_mask.shape == tuple(layout.time_shape)
    assert norm.flatten()[1] == 0
    assert_close("g of the others", layout.rows(clean[0])[[0, 2]], layout.rows(g)[[0, 2]], rel=0)
    F = inputs["F_student"]
    loss = layout.rows(losses.scm_loss(F, F, g, nan_mask=nan_mask)).sum(1)
    assert torch.isfinite(loss).all()
    assert loss[1] == 0


def test_masked_tangent_sends_no_gradient(layout):
    """A NaN tangent with a finite F: the sample's gradient is exactly 0, the others' untouched."""
    inputs = scm_inputs(layout)
    inputs["dF"].select(layout.batch_dim, 2).fill_(math.nan)
    F = inputs["F_student"].requires_grad_()
    g, nan_mask, _ = losses.scm_tangent_target(**inputs, warmup_ratio=0.5, sum_per_sample=layout.sum)
    losses.scm_loss(F, F, g, nan_mask=nan_mask).sum().backward()
    gradient = layout.rows(F.grad)
    assert gradient[2].abs().max() == 0
    assert_close("others", -2 * layout.rows(g)[:2], gradient[:2], rel=1e-13)


def test_sums_over_ranks_give_the_whole_sample():
    """Token shards with a shared sum (as an all-reduce gives it) equal the unsharded call; padding adds nothing."""
    layout = Layout(*LAYOUTS["tokens"])
    inputs = scm_inputs(layout)
    whole = losses.scm_tangent_target(**inputs, warmup_ratio=0.7, sum_per_sample=layout.sum)
    padded = {
        name: x if name == "t" else torch.cat([x, torch.zeros(1, *x.shape[1:], dtype=x.dtype)])
        for name, x in inputs.items()
    }
    pieces = [{name: x if name == "t" else x.chunk(2)[rank] for name, x in padded.items()} for rank in range(2)]
    g_whole = losses.scm_tangent(**padded, warmup_ratio=0.7)
    outputs = []
    for piece in pieces:
        totals = iter([torch.zeros(1, BATCH, 1, dtype=torch.float64), layout.sum(g_whole**2)])  # NaN count, ||g||^2
        answer = losses.scm_tangent_target(
            **piece, warmup_ratio=0.7, sum_per_sample=lambda x, totals=totals: next(totals)
        )
        outputs.append(answer)
    assert_close("g", whole[0], torch.cat([out[0] for out in outputs])[:-1], rel=1e-14)
    assert_close("norm", whole[2], outputs[0][2], rel=1e-14)


def test_finite_differences_converge_to_the_jvp(layout):
    """F(x, t) = sin(x) cos(2t): both differences approach the JVP at (cos sin F_teacher, cos sin) linearly in h."""
    xt, F_teacher, t = layout.randn(), layout.randn(), layout.t

    def network(x, t):
        return torch.sin(x) * torch.cos(2 * t)

    t_xt, t_t = losses.tangent_seed(F_teacher, t)
    exact = torch.func.jvp(network, (xt, t), (t_xt, t_t.expand_as(t)))[1]
    dF_x = torch.func.jvp(network, (xt, t), (t_xt, torch.zeros_like(t)))[1]
    F = network(xt, t)
    errors = {"semicontinuous": [], "discrete": []}
    for h in (1e-3, 1e-4):
        semi = losses.semicontinuous_dF(dF_x, F, network(xt, t - h), t, h=h)
        before = network(losses.discrete_xt_before(xt, F_teacher, h=h), t - h)
        errors["semicontinuous"].append((semi - exact).norm() / exact.norm())
        errors["discrete"].append((losses.discrete_dF(F, before, t, h=h) - exact).norm() / exact.norm())
    for name, (coarse, fine) in errors.items():
        assert fine < 5e-4, name
        assert 8 < coarse / fine < 12, name


def test_dcm_loss_and_gradient(layout):
    x0, target = layout.randn().requires_grad_(), layout.randn().requires_grad_()
    losses.dcm_loss(x0, target).sum().backward()
    assert_close("gradient", 2 * (x0 - target).detach(), x0.grad, rel=1e-14)
    assert target.grad is None


@pytest.mark.parametrize("weight", [1.0, 0.01, 3.0])
def test_dmd_gradient_is_the_weighted_direction(layout, weight):
    """The loss's gradient into G is 2 weight (fake - teacher) / mean|G - teacher|, a sample at a time."""
    fake, teacher, G = layout.randn(), layout.randn(), layout.randn().float().requires_grad_()
    elements = layout.rows(G).shape[1]
    grad, nan_mask = losses.dmd_gradient(fake, teacher, G, num_elements=elements, sum_per_sample=layout.sum)
    assert not nan_mask.any()
    (weight * losses.dmd_loss(G, grad)).sum().backward()
    rows = [layout.rows(x) for x in (fake, teacher, G.detach().double(), G.grad)]
    for b, (f, te, sample, actual) in enumerate(zip(*rows, strict=True)):
        assert_close(f"gradient[{b}]", 2 * weight * (f - te) / (sample - te).abs().mean(), actual, rel=1e-6)


def test_dmd_normalizer_is_clipped_and_counts_true_elements(layout):
    fake, teacher = layout.randn(), layout.randn()
    elements = layout.rows(fake).shape[1]
    arguments = {"sum_per_sample": layout.sum}
    same, _ = losses.dmd_gradient(fake, teacher, teacher, num_elements=elements, **arguments)
    assert_close("clipped", (fake - teacher) / 1e-5, same, rel=1e-13)
    G = layout.randn()
    half, _ = losses.dmd_gradient(fake, teacher, G, num_elements=elements, **arguments)
    full, _ = losses.dmd_gradient(fake, teacher, G, num_elements=2 * elements, **arguments)
    assert_close("twice the elements", 2 * half, full, rel=1e-13)


@pytest.mark.parametrize("poisoned", ["fake", "teacher", "G"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_dmd_masks_nan_samples(layout, poisoned, value):
    inputs = {name: layout.randn() for name in ("fake", "teacher", "G")}
    inputs[poisoned].select(layout.batch_dim, 0).fill_(value)
    elements = layout.rows(inputs["G"]).shape[1]
    grad, nan_mask = losses.dmd_gradient(
        inputs["fake"], inputs["teacher"], inputs["G"], num_elements=elements, sum_per_sample=layout.sum
    )
    loss = layout.rows(losses.dmd_loss(inputs["G"], grad, nan_mask=nan_mask)).sum(1)
    assert nan_mask.flatten().tolist() == [True, False, False]
    assert loss[0] == 0
    assert bool((loss[1:] > 0).all())


def test_fake_score_loss_is_the_velocity_error(layout):
    G, noise, v = layout.randn(), layout.randn(), layout.randn().requires_grad_()
    xt = trigflow.add_noise(G, noise, layout.t)
    loss = losses.fake_score_loss(G, trigflow.denoised(xt, v, layout.t), layout.t)
    target = layout.t.cos() * noise - layout.t.sin() * G
    assert_close("loss", (trigflow.velocity(xt, v, layout.t) - target) ** 2, loss, rel=1e-11)
    loss.sum().backward()
    assert torch.isfinite(v.grad).all()


def test_fake_score_loss_at_time_zero_counts_nothing(layout):
    G, v = layout.randn(), layout.randn().requires_grad_()
    t = torch.zeros_like(layout.t)
    loss = losses.fake_score_loss(G, trigflow.denoised(G, v, t), t)
    loss.sum().backward()
    assert loss.abs().max() == 0
    assert v.grad.abs().max() == 0


def test_the_fake_score_gives_the_student_no_gradient(layout):
    G = layout.randn().requires_grad_()
    assert not losses.fake_score_loss(G, layout.randn(), layout.t).requires_grad


def test_flow_matching_loss(layout):
    x0, noise, v = layout.randn(), layout.randn(), layout.randn().requires_grad_()
    loss = losses.flow_matching_loss(v, x0, noise)
    loss.sum().backward()
    assert_close("gradient", 2 * (v - noise + x0).detach(), v.grad, rel=1e-13)
    assert losses.flow_matching_loss(noise - x0, x0, noise).abs().max() == 0
