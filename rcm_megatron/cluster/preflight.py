"""Looks at every node of a job before it trains, in under a minute, and names the bad ones.

Each rank reports to a TCPStore that rank 0 keeps and waits for with short timeouts, so a node that does not answer is a finding and
not a hang. Collectives begin only when all have reported and run the same versions.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Container, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from rcm_megatron.cluster.bandwidth import measure
from rcm_megatron.cluster.report import Report, look, node_name
from rcm_megatron.cluster.verdict import Findings, nodes_of_ranks
from rcm_megatron.config import RunConfig
from rcm_megatron.platform.device import backend
from rcm_megatron.requests import PreflightRequest

BAD_NODE = 3
"""Exit status when a node is not fit to train on."""

SLOW = 0.5
"""A node with less than this fraction of the nodes' median bandwidth is bad (GPUs only: on CPUs it says who else computes)."""


def preflight(run: RunConfig, request: PreflightRequest) -> int:
    """Exit status of this rank: 0, or BAD_NODE."""
    timeout, listed = request.timeout, [name for name in request.nodes.split(",") if name]
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    findings = Findings(nodes_of_ranks({}, world_size=world_size, listed=listed))
    with _deadline(timeout, rank, findings):
        try:
            store = _store(rank, world_size, 0.5 * timeout)
        except RuntimeError as error:
            return _unreachable(rank, error)
        try:
            if rank == 0:
                return _lead(store, run, findings, timeout=timeout, listed=listed)
            return _follow(store, run, rank, timeout=timeout)
        except RuntimeError as error:
            return _unreachable(rank, error)


def _store(rank: int, world_size: int, timeout: float) -> dist.TCPStore:
    return dist.TCPStore(
        os.environ.get("MASTER_ADDR", "127.0.0.1"),
        int(os.environ.get("MASTER_PORT", "0")),
        world_size,
        is_master=rank == 0,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
    )


def _unreachable(rank: int, error: Exception) -> int:
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    print(f"preflight: {node_name()}: rank {rank} lost rank 0 at {address}: {error}".splitlines()[0], file=sys.stderr)
    return BAD_NODE


def _lead(store: dist.Store, run: RunConfig, findings: Findings, *, timeout: float, listed: Sequence[str]) -> int:
    begin, world_size = time.monotonic(), len(findings.nodes)
    with _token(run, findings) as token:
        store.set("token", token)
        own = _look(run, rank=0, token=token)
        findings.reports[0] = own
        answers = _collect(store, "report", range(1, world_size), until=begin + 0.5 * timeout)
    findings.reports |= {rank: Report.from_json(text) for rank, text in answers.items()}
    findings.nodes[:] = nodes_of_ranks(findings.reports, world_size=world_size, listed=listed)
    _note_missing(findings, findings.reports, f"no report within {0.5 * timeout:g} s", "see what Python said there")
    go = not findings.named_problems(slow=0.0)
    store.set("nodes", json.dumps(findings.nodes if go else []))
    if go:
        findings.clocks |= _read_clocks(store, findings.nodes)
        findings.bandwidths[0] = _measure(store, findings.nodes, 0, timeout=0.3 * timeout)
        answers = _collect(store, "bandwidth", range(1, world_size), until=begin + 0.9 * timeout)
        findings.bandwidths |= {rank: json.loads(text) for rank, text in answers.items()}
        done = {rank: values for rank, values in findings.bandwidths.items() if values or world_size == 1}
        _note_missing(findings, done, "the all-reduce did not end well", "see its message")
    else:
        _collect(store, "left", list(answers), until=time.monotonic() + 3.0)  # the store ends with this process
    return _conclude(findings)


def _follow(store: dist.Store, run: RunConfig, rank: int, *, timeout: float) -> int:
    report = _look(run, rank=rank, token=store.get("token").decode())
    store.set(f"report/{rank}", report.to_json())
    store.wait(["nodes"], timedelta(seconds=timeout))
    nodes = json.loads(store.get("nodes"))
    if not nodes:
        store.set(f"left/{rank}", "")
        return 0  # rank 0 says why
    if rank == nodes.index(nodes[rank]):
        store.wait([f"ask/{rank}"], timedelta(seconds=timeout))
        store.set(f"clock/{rank}", repr(time.time()))
    store.set(f"bandwidth/{rank}", json.dumps(_measure(store, nodes, rank, timeout=0.3 * timeout)))
    return 0


def _look(run: RunConfig, *, rank: int, token: str) -> Report:
    return look(run, rank=rank, local_rank=int(os.environ.get("LOCAL_RANK", "0")), token=token)


@contextlib.contextmanager
def _token(run: RunConfig, findings: Findings) -> Iterator[str]:
    """The name of a file in output_dir that exists as long as the ranks look for it."""
    path = Path(run.output_dir) / f".preflight_{uuid.uuid4().hex}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        findings.problems.append((node_name(), f"output_dir: cannot write to {run.output_dir}: {error.strerror}"))
    try:
        yield path.name
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def _collect(store: dist.Store, what: str, ranks: Sequence[int], *, until: float) -> dict[int, bytes]:
    """What the ranks have put under `what`/RANK until then (time.monotonic)."""
    found = {}
    for rank in ranks:
        key = f"{what}/{rank}"
        with contextlib.suppress(RuntimeError):
            store.wait([key], timedelta(seconds=max(until - time.monotonic(), 0.1)))
            found[rank] = store.get(key)
    return found


def _note_missing(findings: Findings, have: Container[int], what: str, fix: str) -> None:
    for node in dict.fromkeys(findings.nodes):
        silent = [rank for rank, name in enumerate(findings.nodes) if name == node and rank not in have]
        if silent:
            findings.problems.append((node, f"ranks {', '.join(map(str, silent))}: {what}; {fix}"))


def _read_clocks(store: dist.Store, nodes: Sequence[str]) -> dict[str, tuple[float, float]]:
    """{node: (seconds ahead of this clock, uncertainty)} of the other nodes, each asked once: an answer lies within the question's time."""
    clocks = {}
    for node in dict.fromkeys(nodes):
        rank = nodes.index(node)
        if rank == 0:
            continue
        asked = time.time()
        store.set(f"ask/{rank}", "")
        with contextlib.suppress(RuntimeError):
            store.wait([f"clock/{rank}"], timedelta(seconds=5))
            answered = time.time()
            clocks[node] = (float(store.get(f"clock/{rank}")) - (asked + answered) / 2, (answered - asked) / 2)
    return clocks


def _measure(store: dist.Store, nodes: Sequence[str], rank: int, *, timeout: float) -> dict[str, float]:
    """Bandwidths; none when a collective fails, which this rank then says."""
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # a timeout is an exception here, not the end of the process
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        dist.init_process_group(
            backend(),
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=len(nodes),
            timeout=timedelta(seconds=timeout),
        )
        _connect_gloo(timeout)
        return measure(nodes)
    except RuntimeError as error:
        print(f"preflight: {nodes[rank]}: rank {rank}: all-reduce: {error}", file=sys.stderr, flush=True)
        return {}


def _connect_gloo(timeout: float) -> None:
    """Checkpoints are written through Gloo, on GPUs too; it takes the network interface that the host's own name leads to."""
    try:
        dist.barrier(group=dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)))
    except RuntimeError as error:
        raise RuntimeError(
            f"Gloo: {error}; fix: set GLOO_SOCKET_IFNAME to an interface that reaches the others"
        ) from error


def _conclude(findings: Findings) -> int:
    problems = findings.named_problems(slow=SLOW if torch.cuda.is_available() else 0.0)
    print(findings.table(problems), flush=True)
    return BAD_NODE if problems else 0


@contextlib.contextmanager
def _deadline(seconds: float, rank: int, findings: Findings) -> Iterator[None]:
    """End the process when that much time has passed, wherever it stands; rank 0 first says what it knows."""

    def late() -> None:
        print(f"preflight: {node_name()}: rank {rank} did not end in {seconds:g} s; it stands in", file=sys.stderr)
        faulthandler.dump_traceback(all_threads=True)
        if rank == 0:
            _conclude(findings)
        os._exit(BAD_NODE)

    timer = threading.Timer(seconds, late)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
