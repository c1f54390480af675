"""Functions in processes of their own, for what makes a process a rank of a job that is not there does so for good."""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from rcm_megatron.errors import UserError


def run_apart(function: Callable[..., Any], calls: Mapping[str, tuple], *, modules: Sequence[str] = ()) -> list[Any]:
    """``function(*arguments)`` of each of ``calls``, by what an error names it, all at once, each in a process; what they return.

    The processes share the imports of Megatron and of ``modules``. Raises the first UserError that one raises, and RuntimeError with the
    traceback of another error."""
    import torch

    # Before the processes are made, which then share them; the first before all else that imports Megatron.
    for module in ("rcm_megatron.platform.megatron", *modules):
        importlib.import_module(module)

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.set_num_threads(1)
    context, children = multiprocessing.get_context("fork"), []
    for name, arguments in calls.items():
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(theirs, function, arguments), daemon=True)
        child.start()
        theirs.close()
        children.append((child, ours, name))
    found = [_result(ours, name) for _, ours, name in children]
    for child, _, _ in children:
        child.join()
    return found


def _child(connection: Connection, function: Callable[..., Any], arguments: tuple) -> None:
    try:
        result: Any = True, function(*arguments)
    except UserError as error:
        result = False, error
    except Exception:  # whatever it is, the parent raises it
        result = False, traceback.format_exc()
    connection.send(result)
    connection.close()
    os._exit(0)  # nothing of a process group that is not there needs an end


def _result(connection: Connection, name: str) -> Any:
    try:
        is_good, result = connection.recv()
    except EOFError:
        raise RuntimeError(f"the process of {name} ended without a result: out of memory?") from None
    if is_good:
        return result
    raise result if isinstance(result, UserError) else RuntimeError(f"{name}:\n{result}")
