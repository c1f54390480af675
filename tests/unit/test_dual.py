"""Every (primal, tangent) rule against torch.func.jvp of the plain formula in fp64, and recomputation in the backward.

Shapes are odd, the batch is 3, and the inputs are strided views, as the slices of a fused projection are.
"""

import weakref

import pytest
import torch
import torch.nn.functional as F

from rcm_megatron.dual import Dual, add_bias, as_message, from_message, map_linear, primal_of, recomputed, shape_of
from rcm_megatron.models import dual_ops
from rcm_megatron.models.dual_ops import apply_rope, apply_rope_halves
from rcm_megatron.models.rope import rope_frequencies
from tests.helpers import assert_close

TOKENS, BATCH, FEATURES, HEADS, HEAD_DIM = 7, 3, 22, 3, 10
EPS = 1e-6


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def strided(*shape, seed):
    """A view [S, B, ..., last] into a wider tensor: not contiguous."""
    return normal(*shape[:-1], 2, shape[-1], seed=seed).select(-2, 1)


def hidden(seed):
    return strided(TOKENS, BATCH, FEATURES, seed=seed)


def heads(seed):
    return strided(TOKENS, BATCH, HEADS, HEAD_DIM, seed=seed)


def vector(seed):
    """A modulation vector [1, B, D]."""
    return normal(1, BATCH, FEATURES, seed=seed)


def strided_dual(primal, tangent):
    """The two stacked as a strided view, as split_heads leaves them."""
    stacked = torch.cat([primal, tangent], dim=1)
    return Dual(torch.stack([stacked, stacked + 1.0], dim=-2).select(-2, 0))


def reference_rms_norm(x, weight, num_features):
    mean_square = x.square().sum(dim=(-2, -1), keepdim=True) / num_features
    return x / torch.sqrt(mean_square + EPS) * weight


def rotate_pairs(x, rotation):
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = rotation.real[:, None, None], rotation.imag[:, None, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def paired(x, *, back=False):
    """Channels (k, k + K/2) as neighbours; `back` undoes it."""
    parts = x.unflatten(-1, (-1, 2) if back else (2, -1))
    return parts.transpose(-1, -2).flatten(-2)


WEIGHT_D, BIAS_D, WEIGHT_NK = normal(FEATURES, seed=91), normal(FEATURES, seed=92), normal(HEADS, HEAD_DIM, seed=93)
ROTATION = rope_frequencies((1, 3, 2), HEAD_DIM, start=0, length=TOKENS, max_position=8)

# name: (rule, plain formula, inputs)
RULES = {
    "gelu_tanh": (dual_ops.gelu_tanh, lambda x: F.gelu(x, approximate="tanh"), [hidden]),
    "gelu": (dual_ops.gelu, F.gelu, [hidden]),
    "silu": (dual_ops.silu, F.silu, [hidden]),
    "layer_norm": (
        lambda x: dual_ops.layer_norm(x, eps=EPS),
        lambda x: F.layer_norm(x, [FEATURES], eps=EPS),
        [hidden],
    ),
    "layer_norm_affine": (
        lambda x: dual_ops.layer_norm(x, eps=EPS, weight=WEIGHT_D, bias=BIAS_D),
        lambda x: F.layer_norm(x, [FEATURES], WEIGHT_D, BIAS_D, EPS),
        [hidden],
    ),
    "rms_norm_across_heads": (
        lambda x: dual_ops.rms_norm_across_heads(
            x, WEIGHT_NK, eps=EPS, num_features=HEADS * HEAD_DIM, sum_over_tp=lambda total: total
        ),
        lambda x: reference_rms_norm(x, WEIGHT_NK, HEADS * HEAD_DIM),
        [heads],
    ),
    "rms_norm": (
        lambda x: dual_ops.rms_norm(x, WEIGHT_NK[0], eps=EPS),
        lambda x: x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + EPS) * WEIGHT_NK[0],
        [heads],
    ),
    "modulate": (
        lambda x, shift, scale: dual_ops.modulate(x, shift, scale, dtype=torch.float64),
        lambda x, shift, scale: x * (1 + scale) + shift,
        [hidden, vector, vector],
    ),
    "modulate_each_token": (
        lambda x, shift, scale: dual_ops.modulate(x, shift, scale, dtype=torch.float64),
        lambda x, shift, scale: x * (1 + scale) + shift,
        [hidden, hidden, hidden],
    ),
    "gated_residual_each_token": (dual_ops.gated_residual, lambda h, x, gate: h + gate * x, [hidden, hidden, hidden]),
    "gated_residual": (dual_ops.gated_residual, lambda h, x, gate: h + gate * x, [hidden, hidden, vector]),
    "add": (dual_ops.add, lambda a, b: a + b, [hidden, hidden]),
    "add_constant": (lambda x: dual_ops.add_constant(x, BIAS_D), lambda x: x + BIAS_D, [hidden]),
    "add_bias": (lambda x: add_bias(x, BIAS_D), lambda x: x + BIAS_D, [hidden]),
    "map_linear": (lambda x: map_linear(lambda v: v.flatten(2), x), lambda x: x.flatten(2), [heads]),
    "apply_rope": (lambda x: apply_rope(x, ROTATION), lambda x: rotate_pairs(x, ROTATION), [heads]),
    "apply_rope_halves": (
        lambda x: apply_rope_halves(x, ROTATION),
        lambda x: paired(rotate_pairs(paired(x), ROTATION), back=True),
        [heads],
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_rule_is_the_jvp_of_the_plain_formula(name):
    rule, formula, makers = RULES[name]
    primals = tuple(make(10 + i) for i, make in enumerate(makers))
    tangents = tuple(make(50 + i) for i, make in enumerate(makers))
    expected, t_expected = torch.func.jvp(formula, primals, tangents)
    dual = rule(*map(strided_dual, primals, tangents))
    assert isinstance(dual, Dual)
    assert_close(f"{name}: primal", expected, dual.primal, rel=1e-13)
    assert_close(f"{name}: tangent", t_expected, dual.tangent, rel=1e-12, row=1e-11)
    assert_close(f"{name}: plain path", expected, rule(*primals), rel=1e-13)


@pytest.mark.parametrize("name", RULES)
def test_rule_without_tangent_gives_no_tangent(name):
    rule, _, makers = RULES[name]
    dual = rule(*(strided_dual(make(10 + i), torch.zeros_like(make(10 + i))) for i, make in enumerate(makers)))
    assert float(dual.tangent.abs().max()) == 0.0


def test_rms_norm_sums_the_tangent_statistics_of_other_ranks_too():
    """Two halves of the heads, normalised apart with summed statistics, are the whole."""
    x, tx = normal(TOKENS, BATCH, 4, HEAD_DIM, seed=1), normal(TOKENS, BATCH, 4, HEAD_DIM, seed=2)
    weight = normal(4, HEAD_DIM, seed=3)
    expected, t_expected = torch.func.jvp(lambda v: reference_rms_norm(v, weight, 4 * HEAD_DIM), (x,), (tx,))
    stats = torch.stack([x.square().sum(dim=(-2, -1)), (x * tx).sum(dim=(-2, -1))], dim=-1)
    for half in (slice(0, 2), slice(2, 4)):
        dual = dual_ops.rms_norm_across_heads(
            Dual.pack(x[:, :, half], tx[:, :, half]),
            weight[half],
            eps=EPS,
            num_features=4 * HEAD_DIM,
            sum_over_tp=lambda total: stats,
        )
        assert_close(f"primal {half}", expected[:, :, half], dual.primal, rel=1e-13)
        assert_close(f"tangent {half}", t_expected[:, :, half], dual.tangent, rel=1e-12)


def test_rules_keep_the_dtype_of_hidden_states():
    x = Dual.pack(hidden(1).bfloat16(), hidden(2).bfloat16())
    wide = Dual.pack(vector(3).float(), vector(4).float())
    normed = dual_ops.layer_norm(x, eps=EPS)
    assert normed.stacked.dtype == torch.float32
    assert dual_ops.modulate(normed, wide, wide, dtype=torch.bfloat16).stacked.dtype == torch.bfloat16
    assert dual_ops.gated_residual(x, x, wide).stacked.dtype == torch.bfloat16
    assert dual_ops.gelu_tanh(x).stacked.dtype == torch.bfloat16
    rows = Dual.pack(heads(1).bfloat16(), heads(2).bfloat16())
    assert apply_rope(rows, ROTATION.to(torch.complex64)).stacked.dtype == torch.bfloat16


def test_rope_padding_is_not_rotated_and_shards_are_slices_of_the_whole():
    whole = rope_frequencies((2, 3, 5), 22, start=0, length=32, max_position=8)
    assert bool((whole[30:] == 1).all()), "tokens past the grid are padding"
    shards = [rope_frequencies((2, 3, 5), 22, start=8 * i, length=8, max_position=8) for i in range(4)]
    assert torch.equal(whole, torch.cat(shards))
    with pytest.raises(ValueError, match="rope_max_seq_len=4"):
        rope_frequencies((2, 3, 5), 22, start=0, length=30, max_position=4)


def test_dual_is_checked_when_it_is_made():
    with pytest.raises(ValueError, match=r"odd batch in \(7, 3, 22\)"):
        Dual(hidden(0))
    with pytest.raises(ValueError, match=r"\(7, 3, 22\).*\(7, 2, 22\)"):
        Dual.pack(hidden(0), hidden(0)[:, :2])


def test_a_packed_tangent_carries_no_gradient():
    primal, tangent = hidden(1).requires_grad_(), hidden(2).requires_grad_()
    dual = Dual.pack(primal, tangent)
    assert dual.primal is primal
    assert not dual.tangent.requires_grad and not dual.stacked.requires_grad
    assert shape_of(dual) == (TOKENS, 2 * BATCH, FEATURES) and dual.batch == BATCH


# ---- recomputed


class Layer(torch.nn.Module):
    """x -> W2 gelu(norm(x) (1 + c) + c) + x with a second input c, like a block and its modulation."""

    def __init__(self, seed):
        super().__init__()
        self.fc1 = torch.nn.Parameter(normal(FEATURES, FEATURES, seed=seed) / 4)
        self.fc2 = torch.nn.Parameter(normal(FEATURES, FEATURES, seed=seed + 1) / 4)

    def forward(self, x, c):
        y = dual_ops.modulate(dual_ops.layer_norm(x, eps=EPS), c, c, dtype=torch.float64)
        y = dual_ops.gelu_tanh(map_linear(lambda v: v @ self.fc1, y))
        return dual_ops.add(map_linear(lambda v: v @ self.fc2, y), x)


def stack_of_layers(count=3):
    return torch.nn.ModuleList([Layer(20 * i) for i in range(count)])


def gradients_of(layers, x, c, apply):
    """Gradients of a loss of the last primal, by name, and the final output."""
    x, c = x.detach().requires_grad_(), c.detach().requires_grad_()
    h, condition = apply.prepare(x, c)
    for layer in layers:
        h = apply.run(layer, h, condition)
    (primal_of(h) * hidden(77)).sum().backward()
    named = {name: parameter.grad for name, parameter in layers.named_parameters()}
    for parameter in layers.parameters():
        parameter.grad = None
    return named | {"x": x.grad, "c": c.grad}, h


class Plain:
    prepare = staticmethod(lambda x, c: (x, c))
    run = staticmethod(lambda layer, h, c: layer(h, c))


class RecomputedPlain(Plain):
    run = staticmethod(recomputed)


class RecomputedDual(RecomputedPlain):
    prepare = staticmethod(lambda x, c: (Dual.pack(x, hidden(5)), Dual.pack(c, vector(6))))


@pytest.mark.parametrize("kind", [RecomputedPlain, RecomputedDual])
def test_recomputed_gradients_equal_plain_autograd(kind):
    layers, x, c = stack_of_layers(), hidden(1), vector(2)
    reference, _ = gradients_of(layers, x, c, Plain)
    recomputed_gradients, _ = gradients_of(layers, x, c, kind)
    for name, gradient in reference.items():
        assert_close(f"gradient of {name}", gradient, recomputed_gradients[name], rel=1e-12)


def test_tangent_of_a_recomputed_stack_is_its_jvp_and_detached():
    layers, x, c = stack_of_layers(), hidden(1), vector(2)

    def chain(x, c):
        for layer in layers:
            x = layer(x, c)
        return x

    expected, t_expected = torch.func.jvp(chain, (x, c), (hidden(5), vector(6)))
    _, out = gradients_of(layers, x, c, RecomputedDual)
    assert_close("primal", expected, out.primal, rel=1e-13)
    assert_close("tangent", t_expected, out.tangent, rel=1e-12)
    assert out.primal.requires_grad and not out.tangent.requires_grad


def test_recomputed_without_gradient_builds_no_graph():
    with torch.no_grad():
        out = recomputed(Layer(0), Dual.pack(hidden(1), hidden(2)), Dual.pack(vector(3), vector(4)))
    assert out.graph is None and not out.stacked.requires_grad


def test_saved_memory_is_the_primals_and_does_not_keep_a_stack_alive():
    """What a layer saves for its backward owns exactly its own bytes, and every inner stack dies as the next layer returns."""
    layers, saved, stacks = stack_of_layers(4), [], []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    x = hidden(1).requires_grad_()
    c = Dual.pack(vector(2).requires_grad_(), vector(3))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        h = Dual.pack(x, hidden(5))
        for layer in layers:
            h = recomputed(layer, h, c)
            stacks.append(weakref.ref(h.stacked))
    assert [reference() is not None for reference in stacks] == [False, False, False, True]
    inner = [tensor for tensor in saved if tensor.shape == x.shape][1:]  # the first is x itself, a view by construction
    assert len(inner) == len(layers) - 1
    for tensor in inner:
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size(), (
            "a view keeps the stack alive"
        )
    assert len(saved) == 2 * len(layers), "each layer saves its two primal inputs and nothing else"


# ---- messages between pipeline stages


def sent_on(value):
    """What the next stage has: the message's bits, as a leaf that asks for a gradient, as Megatron's schedules hand it over."""
    return as_message(value).detach().clone().requires_grad_()


def test_the_message_of_a_dual_is_its_stack_and_of_a_tensor_itself():
    plain, dual = hidden(1), Dual.pack(hidden(1), hidden(2))
    assert as_message(plain) is plain and from_message(plain, dual=False) is plain
    assert as_message(dual) is dual.stacked, "no copy without a graph"
    received = from_message(sent_on(dual), dual=True)
    assert torch.equal(received.primal, dual.primal) and torch.equal(received.tangent, dual.tangent)


def test_gradient_of_a_message_goes_to_the_primal_alone():
    primal = hidden(1).requires_grad_()
    dual = Dual.pack(2.0 * primal, hidden(2))
    message = as_message(dual)
    assert message.requires_grad and torch.equal(message, dual.stacked)
    gradient = normal(*message.shape, seed=3)
    message.backward(gradient)
    assert torch.equal(primal.grad, 2.0 * gradient[:, :BATCH]), "whatever comes back in the tangent's half is left out"


def test_gradient_of_a_received_dual_has_a_zero_tangent_half():
    message = normal(TOKENS, 2 * BATCH, FEATURES, seed=4).requires_grad_()
    received = from_message(message, dual=True)
    assert received.primal.requires_grad and not received.tangent.requires_grad and not received.stacked.requires_grad
    recomputed(lambda x: map_linear(lambda v: 3.0 * v, x), received).primal.backward(hidden(5))
    assert torch.equal(message.grad[:, :BATCH], 3.0 * hidden(5))
    assert message.grad.shape == message.shape and float(message.grad[:, BATCH:].abs().max()) == 0.0


def test_a_received_message_without_gradient_is_a_dual_without_graph():
    with torch.no_grad():
        received = from_message(normal(TOKENS, 2 * BATCH, FEATURES, seed=4), dual=True)
        assert received.graph is None and as_message(received).data_ptr() == received.stacked.data_ptr()


@pytest.mark.parametrize("kind", [RecomputedPlain, RecomputedDual])
@pytest.mark.parametrize("cut", [1, 2])
def test_two_stages_that_exchange_messages_are_one_network(kind, cut):
    """Output, tangent and every gradient, when layers run on both sides of a message and gradients come back as one."""
    layers = stack_of_layers(3)
    reference, whole = gradients_of(layers, hidden(1), vector(2), kind)
    x, c_first, c_second = (v.detach().requires_grad_() for v in (hidden(1), vector(2), vector(2)))
    h, condition = kind.prepare(x, c_first)
    for layer in layers[:cut]:
        h = kind.run(layer, h, condition)
    sent = as_message(h)
    arrived = sent.detach().clone().requires_grad_()
    h, condition = from_message(arrived, dual=kind is RecomputedDual), kind.prepare(x.detach(), c_second)[1]
    for layer in layers[cut:]:
        h = kind.run(layer, h, condition)
    (primal_of(h) * hidden(77)).sum().backward()
    sent.backward(arrived.grad)
    assert_close("primal", primal_of(whole), primal_of(h), rel=1e-13)
    if kind is RecomputedDual:
        assert_close("tangent", whole.tangent, h.tangent, rel=1e-13)
    assert_close("gradient of x", reference["x"], x.grad, rel=1e-12)
    assert_close("gradient of c", reference["c"], c_first.grad + c_second.grad, rel=1e-12)
    for name, parameter in layers.named_parameters():
        assert_close(f"gradient of {name}", reference[name], parameter.grad, rel=1e-12)
