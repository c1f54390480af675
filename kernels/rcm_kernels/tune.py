"""Measure configurations of the Triton kernels on this GPU, and write the fastest into configs.py.

    python -m rcm_kernels.tune --kernel jvp --head-dim 128           # prints the ranking
    python -m rcm_kernels.tune --write                               # all kernels, head dims 64 and 128, into configs.py

Candidates that spill, serialise wgmma or need too much memory are dropped by the compiler's report, before anything runs; the table's own
entry is timed whatever it does, as it is what runs now. Run the compile test and the GPU tests afterwards: a variant of a winner (masks,
other strides) may spill where the winner does not.
"""

import argparse
import functools
import itertools
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rcm_kernels import configs
from rcm_kernels.benchmark import DTYPES, Case, Inputs, make_inputs, milliseconds
from rcm_kernels.configs import Config, Key

KERNELS = ("jvp", "forward", "dq", "dkdv")


def candidates(base: Config) -> list[Config]:
    """Variations of the entry in the table."""
    tiles = itertools.product((64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4))
    found = [replace(base, block_m=m, block_n=n, warps=w, stages=s) for m, n, w, s in tiles]
    return [base, *(x for x in found if x != base)]


def runner(kernel: str, inputs: Inputs) -> Callable[[Config], Any]:
    """A function of a Config that runs the kernel once."""
    from rcm_kernels.flash_attention import triton_impl as plain
    from rcm_kernels.flash_attention_jvp import triton_impl as jvp

    q, k, v = inputs[:3]
    scale = q.shape[-1] ** -0.5
    if kernel == "jvp":
        carry = jvp.attention_jvp(*inputs)
        return lambda config: jvp.attention_jvp(*inputs, carry=carry, update_carry=True, config=config)
    if kernel == "forward":
        return lambda config: plain.forward(q, k, v, scale, config=config)
    o, lse = plain.forward(q, k, v, scale)
    arguments, dq = (torch.randn_like(o), q, k, v, o, lse, scale), torch.zeros(q.shape, device=q.device)
    if kernel == "dq":  # the other half of the backward is a constant
        return lambda config: plain.backward(*arguments, dq=dq, configs=(config, None))
    return lambda config: plain.backward(*arguments, dq=dq, configs=(None, config))


def problems(key: Key, config: Config) -> list[str]:
    """What the compilers have against a candidate, in words."""
    from triton.runtime.errors import TritonError

    from rcm_kernels.compile_report import compile_entry

    try:
        return compile_entry(key, config).problems(key[1])
    except (RuntimeError, TritonError) as error:
        return [f"does not compile: {error}"]


def problems_of_all(key: Key, found: Sequence[Config]) -> list[list[str]]:
    """`problems` of each, on all cores: a compilation takes seconds, and a GPU waits meanwhile."""
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(functools.partial(problems, key), found))


def tune(
    kernel: str, head_dim: int, dtype: torch.dtype, tokens: int, heads: int, repeats: int
) -> tuple[Key, list[tuple[float, Config]]]:
    """(key of the table, [(milliseconds, Config), ...] fastest first)."""
    key = configs.table_key(kernel, configs.generation(torch.cuda.current_device()), head_dim, dtype)
    run, ranking = runner(kernel, make_inputs(Case(tokens, tokens, heads, head_dim=head_dim), dtype)), []
    found = candidates(configs.TABLE[key])
    for config, wrong in zip(found, problems_of_all(key, found), strict=True):
        if wrong and config != configs.TABLE[key]:
            continue
        ms = milliseconds(functools.partial(run, config), repeats)
        print(f"{key} {ms:9.3f} ms  {config} {', '.join(wrong)}", flush=True)
        ranking.append((ms, config))
    return key, sorted(ranking, key=lambda item: item[0])


def write(key: Key, config: Config, path: Path = Path(configs.__file__)) -> None:
    """Replace one entry of the table in configs.py."""
    kernel, generation, head_dim, kind = key
    begin = f'    ("{kernel}", {generation}, {head_dim}, "{kind}"): Config('
    cut = f"{config.block_m}, {config.block_n}, {config.block_d}, {config.block_e}, {config.warps}, {config.stages}"
    lines = path.read_text().splitlines()
    places = [i for i, line in enumerate(lines) if line.startswith(begin)]
    assert len(places) == 1, f"{len(places)} lines of {path} begin with {begin!r}"
    lines[places[0]] = f"{begin}{cut}),"
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Parse the command line, measure, print the winners."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--tokens", type=int, default=8190)
    parser.add_argument("--heads", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="put the winners into configs.py")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("got no CUDA device; need the NVIDIA GPU to tune for; fix: run this on it")
    for kernel, head_dim in itertools.product(args.kernel, args.head_dim):
        key, ranking = tune(kernel, head_dim, DTYPES[args.dtype], args.tokens, args.heads, args.repeats)
        ms, best = ranking[0]
        before = next(ms for ms, config in ranking if config == configs.TABLE[key])
        print(f"best for {key}: {best}, {ms:.3f} ms (table: {before:.3f} ms)")
        if args.write:
            write(key, best)


if __name__ == "__main__":
    main()
