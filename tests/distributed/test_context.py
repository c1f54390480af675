"""ContextParallel on 2 to 4 Gloo ranks against dense attention on one: o, to, dq, dk, dv, with padding and batch > 1."""

import functools

import pytest
import torch
import torch.distributed as dist

from rcm_megatron.parallel.context import ContextParallel
from tests.distributed.harness import RankError, run_ranks
from tests.helpers import assert_close, dense_attention

LAYOUTS = [(2, 1), (3, 1), (4, 1), (1, 2), (1, 4), (2, 2)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def make_context(ring, ulysses):
    """cp rank = ring_rank * ulysses + ulysses_rank; groups of one rank are None."""
    rank, size = dist.get_rank(), ring * ulysses
    ring_groups = [dist.new_group(list(range(u, size, ulysses))) for u in range(ulysses)] if ring > 1 else None
    neighbours = [list(range(r * ulysses, (r + 1) * ulysses)) for r in range(ring)]
    ulysses_groups = [dist.new_group(ranks) for ranks in neighbours] if ulysses > 1 else None
    ring_group = ring_groups[rank % ulysses] if ring_groups else None
    return ContextParallel(ring_group, ulysses_groups[rank // ulysses] if ulysses_groups else None)


def make_inputs(tokens, dtype, *, b=3, n=4, d=8):
    """q, k, v, do, tq, tk, tv; each token's content has its own scale, so that no two blocks are alike."""
    generator = torch.Generator().manual_seed(0)
    tensors = torch.randn(7, tokens, b, n, d, generator=generator, dtype=torch.float64)
    return list((tensors * torch.linspace(0.5, 2.0, tokens, dtype=torch.float64).view(-1, 1, 1, 1)).to(dtype))


def run_context(ring, ulysses, inputs, valid_tokens):
    """This rank's o, dq, dk, dv, o of the dual, to. Padding (zeros in, garbage out) is added here: NaN where keys are padding."""
    context = make_context(ring, ulysses)
    assert context.size == dist.get_world_size()
    s_local = -(-inputs[0].shape[0] // context.size)
    local = slice(dist.get_rank() * s_local, (dist.get_rank() + 1) * s_local)
    padded = [torch.nn.functional.pad(x, (0, 0) * 3 + (0, s_local * context.size - x.shape[0])) for x in inputs]
    for i in (1, 2, 5, 6):
        padded[i][valid_tokens:] = torch.nan
    q, k, v, do, tq, tk, tv = (x[local].clone() for x in padded)
    with torch.no_grad():
        dual = context.attention_jvp(q, k, v, tq, tk, tv, valid_tokens=valid_tokens)
    primals = [x.requires_grad_() for x in (q, k, v)]
    o = context.attention(*primals, valid_tokens=valid_tokens)
    return o.detach(), *torch.autograd.grad(o, primals, do), *dual


def dense_results(inputs, valid_tokens):
    q, k, v, do, tq, tk, tv = (x.double() for x in inputs)
    attend = functools.partial(dense_attention, valid_keys=valid_tokens)
    o, to = torch.func.jvp(attend, (q, k, v), (tq, tk, tv))
    primals = [x.clone().requires_grad_() for x in (q, k, v)]
    return o, *torch.autograd.grad(attend(*primals), primals, do), o, to


def check(ring, ulysses, tokens, dtype, valid_tokens=None):
    """`tokens` real tokens, padded to a multiple of cp; of these, `valid_tokens` (default all) count as keys."""
    valid_tokens = tokens if valid_tokens is None else valid_tokens
    inputs = make_inputs(tokens, dtype)
    ranks = run_ranks(run_context, ring * ulysses, ring, ulysses, inputs, valid_tokens)
    expected = dense_results(inputs, valid_tokens)
    for i, name in enumerate(("o", "dq", "dk", "dv", "dual o", "to")):
        out = torch.cat([results[i] for results in ranks])[:tokens]
        assert out.dtype == dtype
        assert_close(name, expected[i], out, rel=TOLERANCE[dtype], row=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("ring", "ulysses"), LAYOUTS)
def test_layouts_with_padding(ring, ulysses, dtype):
    check(ring, ulysses, 29, dtype)


@pytest.mark.parametrize(("ring", "ulysses"), LAYOUTS)
def test_layouts_without_padding(ring, ulysses):
    check(ring, ulysses, 24, torch.float64)


@pytest.mark.parametrize(("ring", "ulysses"), [(4, 1), (1, 4), (2, 2)])
def test_ranks_with_only_padding(ring, ulysses):
    check(ring, ulysses, 20, torch.float64, valid_tokens=4)


def run_with_stale_keys(inputs):
    """The known bug of public rings: the backward computes with the block of the previous hop."""
    from rcm_megatron.parallel import ring

    original, previous = ring.attention_backward, []

    def stale(do, q, k, v, o, lse, **options):
        k_used, v_used = previous[-1] if previous else (k, v)
        previous.append((k.clone(), v.clone()))
        return original(do, q, k_used, v_used, o, lse, **options)

    ring.attention_backward = stale
    return run_context(2, 1, inputs, inputs[0].shape[0])


def test_stale_keys_in_the_backward_would_be_caught():
    inputs = make_inputs(24, torch.float64)
    ranks = run_ranks(run_with_stale_keys, 2, inputs)
    expected = dense_results(inputs, 24)
    for i, name in ((1, "dq"), (2, "dk"), (3, "dv")):
        with pytest.raises(AssertionError, match=f"{name}: relative error"):
            assert_close(name, expected[i], torch.cat([results[i] for results in ranks]), rel=1e-2)


def count_messages(ring, ulysses, inputs):
    """Names and number of communications of one dual forward, one primal forward and its backward."""
    calls = []

    def counted(fn):
        def wrapper(*args, **kwargs):
            calls.append(fn.__name__)
            return fn(*args, **kwargs)

        return wrapper

    dist.batch_isend_irecv, dist.all_to_all_single = counted(dist.batch_isend_irecv), counted(dist.all_to_all_single)
    run_context(ring, ulysses, inputs, inputs[0].shape[0])
    return sorted(calls)


@pytest.mark.parametrize(
    ("ring", "ulysses", "hops", "all_to_alls"),
    [(4, 1, 3 + 3 + (3 + 3), 0), (1, 4, 0, 2 + 2 + 2), (2, 2, 1 + 1 + (1 + 1), 2 + 2 + 2)],
)
def test_number_of_messages(ring, ulysses, hops, all_to_alls):
    calls = run_ranks(count_messages, 4, ring, ulysses, make_inputs(8, torch.float64))
    for rank in calls:
        assert rank == ["all_to_all_single"] * all_to_alls + ["batch_isend_irecv"] * hops


def run_heads_error():
    make_context(1, 3).attention(*torch.randn(3, 4, 1, 4, 8).unbind(0))


def test_degree_must_divide_heads():
    with pytest.raises(
        RankError, match=r"got 4 heads on this rank .* and ulysses=3; need .* set ulysses to one of 1, 2, 4"
    ):
        run_ranks(run_heads_error, 3)


def test_one_rank_needs_no_process_group():
    context, inputs = ContextParallel(), make_inputs(7, torch.float64)
    q, k, v, do, tq, tk, tv = inputs
    primals = [x.clone().requires_grad_() for x in (q, k, v)]
    o = context.attention(*primals, valid_tokens=5)
    dual = context.attention_jvp(q, k, v, tq, tk, tv, valid_tokens=5)
    results = o.detach(), *torch.autograd.grad(o, primals, do), *dual
    for i, (ref, out) in enumerate(zip(dense_results(inputs, 5), results, strict=True)):
        assert_close(f"result {i}", ref, out, rel=1e-13)
    with pytest.raises(ValueError, match=r"valid_tokens=8; need 1\.\.7"):
        context.attention(q, k, v, valid_tokens=8)
