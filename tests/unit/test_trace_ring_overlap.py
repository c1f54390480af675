"""The overlap tool's arithmetic on a synthetic trace, its stand-in for hops on a CPU, and its errors."""

import argparse
import json

import pytest
import torch

from rcm_megatron.parallel.ring import Ring
from tests.helpers import assert_close, dense_attention
from tools import trace_ring_overlap as tool


def event(stream, begin, end, category="kernel"):
    """One piece of device work, times in microseconds."""
    return {"ph": "X", "cat": category, "ts": begin, "dur": end - begin, "args": {"stream": stream}}


TRACE = [
    event(7, 0, 1000),
    event(7, 1000, 1500),
    event(7, 1400, 2000),  # overlaps its neighbour: counted once
    event(7, 3000, 3500, "gpu_memcpy"),  # a copy of the compute itself
    event(20, 900, 1100, "gpu_memcpy"),  # hidden, across two kernels
    event(20, 1950, 2150, "gpu_memcpy"),  # 50 of 200 hidden
    event(20, 3400, 3700, "gpu_memcpy"),  # 100 of 300 hidden
    {"ph": "X", "cat": "cpu_op", "ts": 0, "dur": 9000},  # on the host
    {"ph": "i", "cat": "kernel", "ts": 5},
]


def test_share_of_copies_that_hide():
    found = tool.overlap(TRACE)
    assert found == {
        "copy_ms": pytest.approx(0.7),
        "compute_ms": pytest.approx(2.5),
        "both_ms": pytest.approx(0.35),
        "hidden_share": pytest.approx(0.5),
    }


def test_intervals_in_any_order_that_touch_nest_or_repeat():
    assert tool.merged([(4, 5), (0, 3), (1, 2), (3, 3.5), (0, 3)]) == [(0, 3.5), (4, 5)]
    assert tool.common([(0, 10)], [(1, 2), (1, 3), (9, 12)]) == pytest.approx(3)
    assert tool.common([(0, 1)], [(1, 2)]) == 0


def test_a_trace_without_hops_is_an_error():
    with pytest.raises(ValueError, match="got device work on 1 streams in this trace; need two"):
        tool.overlap([event(7, 0, 1)])


def test_a_trace_can_be_read_again(tmp_path, capsys):
    path = tmp_path / "ring_dual.json"
    path.write_text(json.dumps({"traceEvents": TRACE}))
    tool.main(["--trace", str(path)])
    assert "ring_dual copies    0.700 ms, compute    2.500 ms" in capsys.readouterr().out


def test_passes_run_the_ring():
    args = argparse.Namespace(tokens=9, heads=2, head_dim=16)
    torch.manual_seed(0)
    runs = tool.passes(args, Ring(0, 3, lambda *buffers: tool.copy_hop(2, *buffers)), "cpu")
    assert set(runs) == {"dual", "forward", "backward"}
    q, k, v = runs["forward"].args[1:4]
    expected = dense_attention(*(x.double() for x in (q, k, v)))  # of one block: three equal ones change nothing
    assert_close("o", expected, runs["forward"]()[0], rel=6e-3)
    assert_close("dual o", expected, runs["dual"]()[0], rel=6e-3)
    assert [x.shape for x in runs["backward"]()] == [q.shape] * 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_says_what_it_needs(capsys):
    with pytest.raises(SystemExit, match="got no CUDA device; need one to record a trace"):
        tool.main([])
    with pytest.raises(SystemExit):
        tool.main(["--blocks", "1"])
    assert "got --blocks 1 --times 1 --repeats 3; need at least 2, 1 and 1" in capsys.readouterr().err
