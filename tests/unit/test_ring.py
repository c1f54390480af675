"""The ring's order of work on CUDA, without a GPU: its streams and events are stood for by vector clocks, a hop by a copy.

On one rank a copy that stands in for the hop brings the rank's own block again, so a ring of N is attention over N copies of the keys.
"""

import contextlib
import functools
import itertools
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from rcm_megatron.parallel import ring as ring_module
from rcm_megatron.parallel.context import SelfAttention
from rcm_megatron.parallel.ring import Ring, ring_attention_jvp
from tests.helpers import assert_close, dense_attention

SIZE, TOKENS = 4, 5


class Clock:
    """A stream or an event: of each stream, how many of its operations have ended when this one goes on."""

    def __init__(self, seen=()):
        self.seen = Counter(seen)

    def record_event(self):
        return Clock(self.seen)

    def wait_event(self, event):
        self.seen |= event.seen

    def wait_stream(self, stream):
        self.seen |= stream.seen


class Device(TorchDispatchMode):
    """Notes which storage every operation reads or writes, and on which stream it was issued."""

    def __init__(self):
        super().__init__()
        self.main, self.side = Clock(), Clock()
        self.current, self.accesses, self.kept = self.main, [], []

    @contextlib.contextmanager
    def stream(self, stream):
        self.current, before = stream, self.current
        yield
        self.current = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        stream = self.current
        stream.seen[stream] += 1
        given = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **(kwargs or {})}
        written = [given.get(a.name) for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        for tree, writes in (((args, kwargs), False), ((written, () if is_view else outputs), True)):
            for x in tree_iter(tree):
                if isinstance(x, torch.Tensor) and not is_view:
                    self.kept.append(x)  # its address is not given to another
                    address = x.untyped_storage().data_ptr()
                    self.accesses.append((stream, stream.seen[stream], Clock(stream.seen).seen, address, writes))
        return outputs

    @staticmethod
    def ordered(first, second):
        """Whether `first` has ended before `second` begins."""
        return second[2][first[0]] >= first[1]

    def races(self):
        """Pairs of accesses to the same memory, at least one a write, whose order nothing enforces."""
        pairs = itertools.combinations(self.accesses, 2)
        return [(a, b) for a, b in pairs if a[3] == b[3] and (a[4] or b[4]) and not self.ordered(a, b)]

    def hidden_hops(self):
        """Hops beside which the main stream has something to compute, and all hops."""
        hops = {a[1]: a for a in self.accesses if a[0] is self.side}
        main = [a for a in self.accesses if a[0] is self.main]
        beside = [any(not self.ordered(h, m) and not self.ordered(m, h) for m in main) for h in hops.values()]
        return sum(beside), len(beside)


@pytest.fixture
def device(monkeypatch):
    device = Device()
    monkeypatch.setattr(ring_module, "_side_stream", lambda _: device.side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: device.current)
    monkeypatch.setattr(torch.cuda, "stream", device.stream)
    return device


def copy_hop(send, receive):
    receive.copy_(send)
    return ()


def make_inputs():
    """q, k, v, tq, tk, tv."""
    return torch.randn(6, TOKENS, 2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind(0)


def dense_ring(q, k, v, valid_tokens):
    """The same with the blocks of all ranks side by side."""
    keys, values = (x.repeat(SIZE, 1, 1, 1) for x in (k, v))
    return dense_attention(q, keys, values, valid_keys=valid_tokens)


def run_jvp(ring, valid_tokens, device):
    q, k, v, tq, tk, tv = make_inputs()
    with device:
        o, to, _ = ring_attention_jvp(ring, q, k, v, tq, tk, tv, valid_tokens)
    dense = functools.partial(dense_ring, valid_tokens=valid_tokens)
    return torch.func.jvp(dense, (q, k, v), (tq, tk, tv)), (o, to)


def run_gradient(ring, valid_tokens, device):
    q, k, v, do, *_ = make_inputs()
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with device:
        o = SelfAttention.apply(*leaves, ring, valid_tokens)
        got = torch.autograd.grad(o, leaves, do)
    expected = dense_ring(*leaves, valid_tokens)
    return (expected, *torch.autograd.grad(expected, leaves, do)), (o, *got)


@pytest.mark.parametrize("valid_tokens", [SIZE * TOKENS, SIZE * TOKENS - 3])
@pytest.mark.parametrize(("run", "hops"), [(run_jvp, 3), (run_gradient, 3 + 3 + 3)])
def test_no_buffer_is_touched_too_early_and_hops_run_beside_compute(run, hops, valid_tokens, device):
    expected, got = run(Ring(0, SIZE, copy_hop), valid_tokens, device)
    assert not device.races()
    beside, total = device.hidden_hops()
    assert total == hops
    # the last gradient goes home after the last compute, and all else has a block's compute beside it
    assert beside == (hops if run is run_jvp else hops - 1)
    end = device.main.seen
    assert all(end[a[0]] >= a[1] for a in device.accesses), "buffers were given back while a hop used them"
    for i, (ref, out) in enumerate(zip(expected, got, strict=True)):
        assert_close(f"result {i}", ref.detach(), out.detach(), rel=1e-12)


@pytest.mark.parametrize("missing", ["wait_stream", "wait_event"])
def test_a_missing_wait_would_be_seen(missing, device, monkeypatch):
    monkeypatch.setattr(Clock, missing, lambda self, other: None)
    run_gradient(Ring(0, SIZE, copy_hop), SIZE * TOKENS, device)
    assert device.races()


def test_a_carry_is_updated_in_place(monkeypatch):
    """One launch a ring step, into the fp32 tensors of the first."""
    calls, original = [], ring_module.attention_jvp

    def noted(*args, carry=None, **options):
        results = original(*args, carry=carry, **options)
        calls.append((carry and carry[1].data_ptr(), results[1].data_ptr(), results[1].dtype))
        return results

    monkeypatch.setattr(ring_module, "attention_jvp", noted)
    inputs = [x.bfloat16() for x in make_inputs()]
    o, to, _ = ring_attention_jvp(Ring(0, SIZE, copy_hop), *inputs, SIZE * TOKENS)
    assert (o.dtype, to.dtype) == (torch.bfloat16, torch.bfloat16)
    first = calls[0][1]
    assert calls == [(None, first, torch.float32)] + [(first, first, torch.float32)] * 3


def test_sums_of_bf16_blocks_are_fp32(monkeypatch):
    """Outputs are merged, dq is summed, and dk and dv travel in fp32; keys and values travel as they are."""
    messages, merged, sums = [], [], []
    merge, backward = ring_module._merge, ring_module.attention_backward

    def noted_merge(o, *others):
        merged.append(o.dtype)
        return merge(o, *others)

    def noted_backward(*args, dq, **options):
        sums.append(dq.dtype)
        return backward(*args, dq=dq, **options)

    def exchange(send, receive):
        messages.append((send.dtype, tuple(send.shape[:1])))
        return copy_hop(send, receive)

    monkeypatch.setattr(ring_module, "_merge", noted_merge)
    monkeypatch.setattr(ring_module, "attention_backward", noted_backward)
    q, k, v, do, *_ = (x.bfloat16() for x in make_inputs())
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    o = SelfAttention.apply(*leaves, Ring(0, SIZE, exchange), SIZE * TOKENS)
    assert messages == [(torch.bfloat16, (2,))] * 3
    messages.clear()
    gradients = torch.autograd.grad(o, leaves, do)
    assert messages.count((torch.float32, (2,))) == messages.count((torch.bfloat16, (2,))) == 3
    assert merged == [torch.float32] * 3 and sums == [torch.float32] * SIZE
    wide = [x.detach().double().requires_grad_() for x in leaves]
    expected = dense_ring(*wide, SIZE * TOKENS)
    references = (expected, *torch.autograd.grad(expected, wide, do.double()))
    for name, ref, out in zip(("o", "dq", "dk", "dv"), references, (o, *gradients), strict=True):
        assert_close(name, ref.detach(), out.detach(), rel=6e-3)
