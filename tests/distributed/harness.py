"""Run a function on N Gloo ranks of this machine: `run_ranks(fn, world_size, *args)`.

Importing megatron.core, diffusers and DALI takes 10 to 40 s of a process, so the ranks are *forked* from a process that has imported
them already. pytest itself cannot be that process: once autograd has run, its threads are gone in a forked child
and the child's first backward hangs. So the first call starts one clean fork server (a fresh interpreter, which never runs
autograd); it lives until pytest ends and forks the ranks of every call.

Rules for `fn`:
- it is defined at the top level of an importable module; that module must not run autograd while it is imported;
- `fn` finds torch.distributed initialised (Gloo, `dist.get_rank()`), one thread, and RANK, LOCAL_RANK and WORLD_SIZE set;
- what it needs of `rcm_megatron.platform` it calls itself: the server has imported megatron.core and patched nothing;
- arguments and results travel by pickle; return plain numbers or detached tensors.
"""

import atexit
import contextlib
import faulthandler
import importlib
import multiprocessing as mp
import multiprocessing.connection as mpc
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

PREIMPORT = (
    "rcm_megatron.platform.megatron",
    "rcm_megatron.training.trainer",
    "rcm_megatron.inference.export",
    "rcm_megatron.inference.sample",
    "megatron.core.transformer.multi_token_prediction",
    "diffusers.models.transformers.transformer_wan",
    "nvidia.dali.fn",
    "nvidia.dali.types",
)
_server = None


class RankError(RuntimeError):
    """A rank raised, died, or did not finish in time. `rank` is None for a timeout; the text holds the rank's traceback."""

    def __init__(self, message, *, rank):
        super().__init__(message)
        self.rank = rank


def run_ranks(fn, world_size, *args, timeout=600.0):
    """Call `fn(*args)` on `world_size` Gloo ranks; returns the list of their results, by rank.

    The first rank that raises ends all of them: its traceback is raised here as a RankError that names it. After `timeout`
    seconds all ranks are killed and the RankError shows where each of them stood.
    """
    if fn.__module__ == "__main__" or "<locals>" in fn.__qualname__:
        raise ValueError(
            f"got fn={fn.__module__}.{fn.__qualname__}; need a function at the top level of an importable module, because "
            "the fork server imports it by name; fix: move it into a test module"
        )
    server = _start_server()
    request = (list(sys.path), _umask(), fn.__module__, fn.__qualname__, world_size, pickle.dumps(args), timeout)
    try:
        server.conn.send_bytes(pickle.dumps(request))
        rank, payload = pickle.loads(server.conn.recv_bytes())
    except BaseException:  # an interrupt leaves a reply in the pipe: never reuse that server
        server.stop()
        raise
    if isinstance(payload, str):
        raise RankError(payload, rank=rank)
    return [pickle.loads(result) for result in payload]


def _umask():
    """This process' umask, which the ranks get: their server has that of the moment at which it was started."""
    os.umask(umask := os.umask(0o077))
    return umask


class _Server:
    def __init__(self):
        self.conn, theirs = mp.Pipe()
        command = [sys.executable, os.path.abspath(__file__), str(theirs.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True)
        theirs.close()
        self.conn.send_bytes(pickle.dumps(list(sys.path)))

    def stop(self):
        global _server
        _server = None
        self.conn.close()  # the server sees the end of the pipe, kills its ranks and leaves
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()


def _start_server():
    global _server
    if _server is None or _server.process.poll() is not None:
        _server = _Server()
        atexit.register(_server.stop)
    return _server


def _serve(conn):
    """Import once, then fork the ranks of each request until the other end closes."""
    sys.path[:] = pickle.loads(conn.recv_bytes())
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Transformer Engine and Apex are not installed", four times
        for module in PREIMPORT:
            importlib.import_module(module)
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            request = pickle.loads(conn.recv_bytes())
        except EOFError:
            return
        reply = _run(conn, *request)
        if reply is None:
            return
        conn.send_bytes(pickle.dumps(reply))


def _run(conn, path, umask, module, qualname, world_size, args, timeout):
    """Fork the ranks and collect: (None, [result bytes]) or (rank, error text); None when the client has gone."""
    sys.path[:] = path
    os.umask(umask)
    try:
        importlib.import_module(module)  # here, so that every later fork has it
    except Exception:  # whatever it is, the client must hear of it
        return None, f"import of {module} failed in the fork server:\n{traceback.format_exc()}"
    scratch = tempfile.mkdtemp(prefix="rcm_ranks_")
    workers, pipes = [], {}
    try:
        for rank in range(world_size):
            receiver, sender = mp.Pipe(duplex=False)
            target_args = (sender, conn, rank, world_size, scratch, module, qualname, args)
            worker = mp.get_context("fork").Process(target=_rank_main, args=target_args)
            worker.start()
            sender.close()
            workers.append(worker)
            pipes[receiver] = rank
        return _collect(conn, pipes, workers, scratch, timeout)
    finally:
        for worker in workers:
            _kill_group(worker)
        shutil.rmtree(scratch, ignore_errors=True)


def _collect(conn, pipes, workers, scratch, timeout):
    results, end = [None] * len(workers), time.monotonic() + timeout
    while pipes:
        ready = mpc.wait([*pipes, conn], timeout=max(0.0, end - time.monotonic()))
        if conn in ready:
            return None
        if not ready:
            late = sorted(pipes.values())
            stacks = _stacks(workers, late, scratch)
            return None, f"ranks {late} of {len(workers)} did not finish in {timeout:g} s\n{stacks}"
        for receiver in ready:
            rank = pipes.pop(receiver)
            try:
                ok, payload = pickle.loads(receiver.recv_bytes())
            except EOFError:
                workers[rank].join(5)
                return rank, f"rank {rank} of {len(workers)} died without a result, exit code {workers[rank].exitcode}"
            if not ok:
                return rank, f"rank {rank} of {len(workers)} raised:\n{payload}"
            results[rank] = payload
    return None, results


def _stacks(workers, ranks, scratch):
    """Where each unfinished rank stands, by faulthandler."""
    for rank in ranks:
        if workers[rank].is_alive():
            os.kill(workers[rank].pid, signal.SIGUSR1)
    time.sleep(0.5)
    texts = []
    for rank in ranks:
        path = Path(scratch, f"stack{rank}")
        texts.append(f"--- rank {rank}\n" + (path.read_text() if path.exists() else "(not started)"))
    return "\n".join(texts)


def _kill_group(worker):
    """The rank and whatever it started (checkpoint savers start processes of their own)."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.kill()  # a rank that has not made its process group yet
    worker.join()


def _rank_main(sender, conn, rank, world_size, scratch, module, qualname, args):
    os.setpgid(0, 0)
    conn.close()
    stack_file = open(os.path.join(scratch, f"stack{rank}"), "w")  # noqa: SIM115 - open as long as the process
    faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=True)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        torch.manual_seed(0)
        store = f"file://{scratch}/store"
        dist.init_process_group(
            "gloo", init_method=store, rank=rank, world_size=world_size, timeout=timedelta(minutes=30)
        )
        fn = sys.modules[module]
        for name in qualname.split("."):
            fn = getattr(fn, name)
        result = pickle.dumps(fn(*pickle.loads(args)))
        if dist.is_initialized():
            dist.barrier()  # no rank leaves while another still reads from it
            dist.destroy_process_group()
        reply = (True, result)
    except BaseException:  # SystemExit of a rank is a failure too
        reply = (False, traceback.format_exc())
    sys.stdout.flush()
    sys.stderr.flush()
    sender.send_bytes(pickle.dumps(reply))
    sender.close()
    os._exit(0)


if __name__ == "__main__":
    _serve(mpc.Connection(int(sys.argv[1])))
