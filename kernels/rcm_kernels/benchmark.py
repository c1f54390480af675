"""Speed and memory of the attention kernels on one GPU, beside torch's flash attention and what else is installed in the same run.

    python -m rcm_kernels.benchmark --output runs/kernels                        # all cases -> runs/kernels/attention.csv
    python -m rcm_kernels.benchmark --cases self_14b_480p --against ~/rcm        # and the kernel of a checkout of NVlabs/rcm
    python tools/plot_kernel_benchmark.py runs/kernels/attention.csv             # -> attention.png

TFLOP/s count matmuls: 12 s l d operations per head with all tangents, 8 without tk, tv, 4 plain, 10 for a backward. The peak is
that of torch's own matmul, 8192 x 8192 x 8192 in the same type, measured first. Needs an NVIDIA GPU; the reference on a CPU is
timed by `rcm_kernels.flash_attention_jvp.benchmark`.
"""

import argparse
import contextlib
import csv
import functools
import importlib.util
import inspect
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rcm_kernels.flash_attention.backends import Backend

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
"""q, k, v, tq, tk, tv."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One call of attention_jvp."""

    queries: int
    keys: int
    heads: int
    batch: int = 1
    head_dim: int = 128
    key_tangents: bool = True
    carry: bool = False


CASES = {
    "self_14b_480p": Case(32760, 32760, 40),
    "self_14b_720p": Case(75600, 75600, 40),
    "cross_14b_480p": Case(32760, 512, 40, key_tangents=False),
    "self_1.3b_480p": Case(32760, 32760, 12),
    "cross_1.3b_480p": Case(32760, 512, 12, key_tangents=False),
    "ring_14b_480p_cp8": Case(4095, 4095, 40, carry=True),
    "ring_14b_480p_cp4": Case(8190, 8190, 40, carry=True),
    "ring_14b_720p_cp4": Case(18900, 18900, 40, carry=True),
    "head_dim_64": Case(16384, 16384, 24, head_dim=64),
}


def milliseconds(fn: Callable[[], Any], repeats: int) -> float:
    """Median time of `fn` on the GPU, after two calls that warm up."""
    times = []
    for i in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        fn()
        end.record()
        end.synchronize()
        if i >= 2:
            times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def matmul_peak(dtype: torch.dtype, repeats: int, size: int = 8192) -> float:
    """TFLOP/s of torch.matmul."""
    a, b = torch.randn(2, size, size, device="cuda").to(dtype).unbind(0)
    return 2 * size**3 / milliseconds(functools.partial(torch.matmul, a, b), repeats) / 1e9


def peak_memory(fn: Callable[[], Any]) -> float:
    """MiB that one call needs at most beside its inputs."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fn()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


NVLABS_FILE = Path("rcm/utils/flash_attention_jvp_triton.py")
NVLABS_ARGUMENTS = ["q", "k", "v", "tq", "tk", "tv"]


def load_nvlabs(path: str | Path) -> Callable[..., Any]:
    """The attention function of NVlabs/rcm (as of commit 5b41aa9) in the user's own checkout: [b, n, s, d] tensors -> (o, to).

    Its file takes the backward from flash-attn, which is not timed here: where that is not installed, an empty module stands in.
    Raises ValueError for a folder that holds no such function.
    """
    file = Path(path).expanduser() / NVLABS_FILE
    if not file.is_file():
        raise ValueError(
            f"got --against {path}, without {NVLABS_FILE}; need a checkout of github.com/NVlabs/rcm; fix: clone it"
        )
    spec = importlib.util.spec_from_file_location("nvlabs_flash_attention_jvp", file)
    module = importlib.util.module_from_spec(spec)
    try:
        with _flash_attn_or_stand_in():
            spec.loader.exec_module(module)
    except ImportError as error:
        raise ValueError(
            f"got --against {path}, whose {NVLABS_FILE.name} cannot be imported ({error}); need its packages; fix: install them"
        ) from error
    function = getattr(module, "attention", None)
    # `attention` is an autograd.Function's apply
    forward = getattr(getattr(function, "__self__", None), "forward", None)
    names = [] if forward is None else list(inspect.signature(forward).parameters)
    if names[1:7] != NVLABS_ARGUMENTS:
        raise ValueError(
            f"got --against {path}, whose {NVLABS_FILE.name} has no attention({', '.join(NVLABS_ARGUMENTS)}) that is an autograd "
            "function; need it as in commit 5b41aa9 of github.com/NVlabs/rcm; fix: check that commit out"
        )
    return function


@contextlib.contextmanager
def _flash_attn_or_stand_in() -> Iterator[None]:
    names = ("flash_attn", "flash_attn.flash_attn_interface")
    stand_in = importlib.util.find_spec(names[0]) is None
    if stand_in:
        modules = [types.ModuleType(name) for name in names]
        modules[1]._flash_attn_backward = modules[1]._flash_attn_varlen_backward = _no_backward
        sys.modules.update(zip(names, modules, strict=True))
    try:
        yield
    finally:
        for name in names if stand_in else ():
            del sys.modules[name]


def _no_backward(*args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError("the backward of NVlabs/rcm needs flash-attn, which is not installed")


def nvlabs_call(
    function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, tq: Tensor, tk: Tensor | None, tv: Tensor | None
) -> Callable[[], Any]:
    """Its call on [s, b, n, d] views: it has no way to leave tk and tv out, and wants tangents with the strides of their primals."""
    zeros = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).zero_() for x in (k, v)]
    tk, tv = (zero if tangent is None else tangent for tangent, zero in zip((tk, tv), zeros, strict=True))
    return functools.partial(function, *(x.permute(1, 2, 0, 3) for x in (q, k, v, tq, tk, tv)))


def make_inputs(case: Case, dtype: torch.dtype, device: str = "cuda") -> Inputs:
    """q, k, v, tq, tk, tv as a training step has them: halves of stacked duals [s, 2b, n, d]."""

    def stack(length: int) -> tuple[Tensor, Tensor]:
        dual = torch.randn(length, 2 * case.batch, case.heads, case.head_dim, device=device, dtype=dtype)
        return dual[:, : case.batch], dual[:, case.batch :]

    (q, tq), (k, tk), (v, tv) = stack(case.queries), stack(case.keys), stack(case.keys)
    return (q, k, v, tq, tk, tv) if case.key_tangents else (q, k, v, tq, None, None)


def other_libraries() -> "dict[str, Backend]":
    """{name: Backend} of plain attention beside torch's flash attention, where they run; says which do not."""
    from rcm_kernels.flash_attention import backends

    found = {}
    for name in ("cudnn", "flash_attn_3", "flash_attn_2"):
        try:
            found[name] = backends.load(name)
        except ValueError as error:
            print(f"{name} is not timed: {error.__cause__}")
    return found


def candidates(
    case: Case, inputs: Inputs, nvlabs: Callable[..., Any] | None, libraries: "Mapping[str, Backend]"
) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """(implementation, operations per s*l*d, function) to be timed."""
    from rcm_kernels.flash_attention import backends
    from rcm_kernels.flash_attention_jvp import triton_impl

    q, k, v = inputs[:3]
    scale = case.head_dim**-0.5
    if q.dtype != torch.float32:  # torch's flash attention takes half precision only
        aten = backends.load("aten_cuda")
        yield "aten flash, forward", 4, functools.partial(aten.forward, q, k, v, scale)
    carry = triton_impl.attention_jvp(*inputs) if case.carry else None
    jvp = functools.partial(triton_impl.attention_jvp, *inputs, carry=carry, update_carry=case.carry)
    yield "triton, with tangent", 12 if case.key_tangents else 8, jvp
    if nvlabs is not None:
        yield "NVlabs/rcm, with tangent", 12 if case.key_tangents else 8, nvlabs_call(nvlabs, *inputs)
    if case.key_tangents and q.dtype != torch.float32:
        (o, lse), triton_backend = aten.forward(q, k, v, scale), backends.load("triton")
        do = torch.randn_like(o)
        yield "triton, forward", 4, functools.partial(triton_backend.forward, q, k, v, scale)
        yield "aten flash, backward", 10, functools.partial(aten.backward, do, q, k, v, o, lse, scale)
        yield "triton, backward", 10, functools.partial(triton_backend.backward, do, q, k, v, o, lse, scale)
        for name, library in libraries.items():
            yield f"{name}, forward", 4, functools.partial(library.forward, q, k, v, scale)
            yield f"{name}, backward", 10, functools.partial(library.backward, do, q, k, v, o, lse, scale)


def environment() -> dict[str, str | None]:
    """Columns that say where a row comes from."""
    import triton

    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    ).stdout.strip()
    columns = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    return columns | {"triton": triton.__version__, "commit": commit or "unknown"}


def measure(
    name: str,
    case: Case,
    dtype: torch.dtype,
    peak: float,
    repeats: int,
    nvlabs: Callable[..., Any] | None,
    libraries: "Mapping[str, Backend]",
) -> Iterator[dict[str, Any]]:
    """Rows of the table for one case."""
    inputs, plain_ms = make_inputs(case, dtype), None
    for implementation, operations, fn in candidates(case, inputs, nvlabs, libraries):
        memory, ms = peak_memory(fn), milliseconds(fn, repeats)
        plain_ms = ms if implementation == "aten flash, forward" else plain_ms
        rate = operations * case.queries * case.keys * case.head_dim * case.heads * case.batch / ms / 1e9
        row = {"case": name, "implementation": implementation} | asdict(case) | {"ms": round(ms, 4)}
        row |= {"tflops": round(rate, 1), "percent_of_matmul": round(100 * rate / peak, 1)}
        ratio = "" if plain_ms is None else round(ms / plain_ms, 3)
        yield row | {"ratio_to_aten_forward": ratio, "peak_mib": round(memory), "matmul_tflops": round(peak, 1)}


def main() -> None:
    """Parse the command line, measure, print, and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--against", metavar="PATH", help="a checkout of NVlabs/rcm, whose kernel is timed too")
    parser.add_argument("--output", type=Path, default=Path("runs/kernels"), help="folder of attention.csv")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            "got no CUDA device; need an NVIDIA GPU: this measures GPU kernels; fix: run it on one, or time the reference on "
            "the CPU with python -m rcm_kernels.flash_attention_jvp.benchmark"
        )
    try:
        nvlabs = load_nvlabs(args.against) if args.against else None
    except ValueError as error:
        sys.exit(str(error))
    dtype, where, libraries = DTYPES[args.dtype], environment(), other_libraries()
    peak = matmul_peak(dtype, args.repeats)
    print(", ".join(f"{k} {v}" for k, v in where.items()), f"{args.dtype}, matmul {peak:.0f} TFLOP/s", sep=", ")
    args.output.mkdir(parents=True, exist_ok=True)
    with (args.output / "attention.csv").open("w", newline="") as file:
        writer = None
        for name in args.cases:
            for row in measure(name, CASES[name], dtype, peak, args.repeats, nvlabs, libraries):
                row |= {"dtype": args.dtype} | where
                if writer is None:
                    writer = csv.DictWriter(file, list(row))
                    writer.writeheader()
                writer.writerow(row)
                file.flush()
                speed = f"{row['ms']:10.3f} ms {row['tflops']:7.1f} TFLOP/s {row['percent_of_matmul']:5.1f} %"
                print(
                    f"{name:18s} {row['implementation']:26s} {speed}  x{row['ratio_to_aten_forward']}  {row['peak_mib']} MiB"
                )


if __name__ == "__main__":
    main()
