"""What the compilers make of the shipped kernels, without a GPU: registers, spills, shared memory.

    python -m rcm_kernels.compile_report                      # the table, of what `VARIANTS` calls the main variant
    python -m rcm_kernels.compile_report --all --generation 90
    python -m rcm_kernels.compile_report --write              # into kernels/README.md
    python -m rcm_kernels.compile_report --fused              # every launch of the element-wise and norm kernels

Triton compiles ahead of time for an architecture, and its own ptxas reports (-v) on the result.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from rcm_kernels.benchmark import DTYPES
from rcm_kernels.configs import SHARED_MEMORY, TABLE, Config, Key, narrower
from rcm_kernels.flash_attention import triton_impl as plain
from rcm_kernels.flash_attention_jvp import triton_impl as jvp
from rcm_kernels.fused.launches import launches, signature
from rcm_kernels.launch import Launch

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- compile_report: begin -->", "<!-- compile_report: end -->"
MATMUL = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
SERIALISED = "wgmma.mma_async instructions are serialized"
OPTIONS = ("num_warps", "maxnreg")
"""Of a launch's meta, what is the compiler's and not a constant of the kernel."""

JVP_OF_TRAINING = ("first step", "one rank", "cross")
"""Without a carry, with results in bf16 too, and without tk and tv."""

VARIANTS = {
    "jvp": ("main", *JVP_OF_TRAINING, "chunked", "other strides", "odd head dim", "fp16"),
    "forward": ("main", "odd head dim", "fp16"),
    "dq": ("main", "odd head dim", "fp16"),
    "dkdv": ("main", "odd head dim", "fp16"),
}
"""Per kernel, what is compiled; "main" is a ring step in bf16 with tangents of keys, or with an fp32 sum of dq."""


@dataclass(frozen=True)
class Report:
    """What ptxas says of one kernel."""

    registers: int
    spilled: int
    """Bytes kept, stored and loaded because registers ran out: these kernels have nothing else on a stack."""
    shared: int
    tensor_memory: int
    """Columns, of 512 (Blackwell)."""
    serialised: bool
    """ptxas waits for every wgmma before the next instruction."""
    matmuls: int
    """The generation's own matmul instructions in the code."""

    def problems(self, generation: int, *, multiplies: bool = True) -> list[str]:
        """What must not be shipped, in words. `multiplies`: the kernel has matmuls."""
        limit, found = SHARED_MEMORY[generation], []
        if self.spilled:
            found.append(f"spills {self.spilled} bytes")
        if self.shared > limit:
            found.append(f"needs {self.shared} bytes of shared memory, limit {limit}")
        if self.tensor_memory > 512:
            found.append(f"needs {self.tensor_memory} columns of tensor memory, limit 512")
        if self.serialised:
            found.append("wgmma serialised")
        if multiplies and self.matmuls == 0:
            found.append(f"has no {MATMUL[generation]} instruction")
        if multiplies and self.registers < 32:
            found.append(f"uses {self.registers} registers: the body was removed")
        return found


def versions() -> str:
    """Of the compilers."""
    names: list[str] = []
    for generation in SHARED_MEMORY:
        tool = get_ptxas(generation)
        name = f"{Path(tool.path).name} {tool.version}"
        names += [] if name in names else [name]
    return f"Triton {triton.__version__}, {', '.join(names)}"


# ---- compiling


def compile_entry(key: Key, config: Config, variant: str = "main") -> Report:
    """An attention kernel on configuration `config` for table key (kernel, generation, head dim, kind)."""
    kernel, generation, head_dim, kind = key
    dtype = "fp32" if kind == "fp32" else "fp16" if variant == "fp16" else "bf16"
    fn, pointers, constants = _call(kernel, variant, dtype)
    if variant == "odd head dim":
        head_dim -= 8
    if variant in ("chunked", "other strides", "odd head dim"):
        config = narrower(config)
    dot_type = {"fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16}[dtype]
    constants |= {"P_TYPE": dot_type, "DOT_TYPE": dot_type, "PRECISION": "tf32x3" if kind == "fp32" else "tf32"}
    constants |= {"HEAD_DIM": head_dim, "BLOCK_D": config.block_d, "BLOCK_E": config.block_e}
    constants |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    types, divisible = _signature(fn, pointers, constants)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return _compile(ASTSource(fn, types, constexprs=constants, attrs=divisible), generation, options)


def compile_launch(launch: Launch, generation: int) -> Report:
    """A launch of a fused kernel, as Triton would compile it the first time."""
    kernel, _, arguments, meta = launch
    types, constants, attributes = signature(kernel, arguments)
    options = {name: value for name, value in meta.items() if name in OPTIONS}
    constants |= {name: value for name, value in meta.items() if name not in OPTIONS}
    types |= dict.fromkeys(kernel.arg_names[len(arguments) :], "constexpr")
    return _compile(ASTSource(kernel, types, constants, attributes), generation, options)


def _call(kernel: str, variant: str, dtype: str) -> tuple[JITFunction, dict[str, str], dict[str, Any]]:
    """(kernel function, type per pointer, constants) as a launcher would call it."""
    if kernel == "jvp":
        pointers = dict.fromkeys(("q", "k", "v", "tq", "tk", "tv"), dtype)
        pointers |= dict.fromkeys(("o", "to", "lse", "mu", "carry_o", "carry_to", "carry_lse", "carry_mu"), "fp32")
        if variant in ("one rank", "cross"):
            pointers |= dict.fromkeys(("o", "to"), dtype)
        no_carry = variant in ("first step", "one rank", "cross")
        constants: dict[str, Any] = {"HAS_TK": variant != "cross", "SAME_STRIDES": variant != "other strides"}
        constants |= {"HAS_CARRY": not no_carry, "CHUNKED": variant == "chunked"}
        absent: tuple[str, ...] = ("tk", "tv") if variant == "cross" else ()
        absent += tuple(x for x in pointers if x.startswith("carry")) if no_carry else ()
        return jvp.forward_kernel, pointers, constants | dict.fromkeys(absent)
    if kernel == "forward":
        return plain.forward_kernel, dict.fromkeys(("q", "k", "v", "o"), dtype) | {"lse": "fp32"}, {}
    pointers = dict.fromkeys(("stay1", "stay2", "pass1", "pass2"), dtype)
    pointers |= dict.fromkeys(("lse", "delta", "grad1", "grad2"), "fp32")
    constants = {"KEYS_STAY": kernel == "dkdv", "ACCUMULATE": kernel == "dq"}
    return plain.backward_kernel, pointers, constants | ({"grad2": None} if kernel == "dq" else {})


def _signature(
    fn: JITFunction, pointers: Mapping[str, str], constants: Mapping[str, Any]
) -> tuple[dict[str, str], dict[tuple[int], Any]]:
    """(type by name, attributes by index): pointers and strides divide by 16 where head dims do."""
    types, divisible = {}, {}
    for index, name in enumerate(fn.arg_names):
        if name in constants:
            types[name] = "constexpr"
            continue
        types[name] = "*" + pointers[name] if name in pointers else "fp32" if name == "scale" else "i32"
        if name in pointers or name.endswith(("_s", "_b", "_n")):
            divisible[(index,)] = [["tt.divisibility", 16]]
    return types, divisible


def _compile(source: ASTSource, generation: int, options: Mapping[str, int]) -> Report:
    compiled = triton.compile(source, target=GPUTarget("cuda", generation, 32), options=dict(options))
    log = _ptxas(compiled.asm["ptx"], generation)
    used = re.search(r"Used (\d+) registers", log)
    if used is None:
        raise RuntimeError(
            f"got a report of ptxas without a number of registers; need one; fix: read it: {log[-2000:]}"
        )
    spilled = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", log)
    tensor_memory = getattr(compiled.metadata, "tmem_size", 0) or 0
    matmuls = compiled.asm["ptx"].count(MATMUL[generation])
    return Report(
        int(used[1]), sum(map(int, spilled)), compiled.metadata.shared, tensor_memory, SERIALISED in log, matmuls
    )


def _ptxas(ptx: str, generation: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        name = f"sm_{generation}{'a' if generation >= 90 else ''}"
        # Triton's own options (3.7.1), so that this is the code that runs
        command = [get_ptxas(generation).path, "-v", "--regAllocOptLevel=2", f"--gpu-name={name}", str(path)]
        result = subprocess.run([*command, "-o", f"{folder}/out"], capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"ptxas failed: {result.stderr[-2000:]}")
    return result.stderr


# ---- tables


def row(key: Key, config: Config, variant: str, report: Report | None) -> str:
    """A line of the table; without a report the part of it that says what is compiled."""
    kernel, generation, head_dim, kind = key
    pieces = "" if config.block_d >= head_dim else f", head dim by {config.block_d}"
    pieces += "" if config.block_e >= head_dim else f", results by {config.block_e}"
    cut = f"{config.block_m} × {config.block_n}, {config.warps} warps, {config.stages} stages{pieces}"
    cells = [kernel, f"sm_{generation}", head_dim, kind, variant, cut]
    if report is not None:
        columns = f" + {report.tensor_memory} columns" if report.tensor_memory else ""
        cells += [report.registers, report.spilled, f"{report.shared:,}{columns}"]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def table(keys: Sequence[Key], all_variants: bool) -> Iterator[str]:
    """Lines of Markdown: the attention kernels."""
    yield _limits()
    yield ""
    yield "| kernel | for | head dim | type | variant | rows × rows of a step | registers | spilled bytes | shared bytes |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for key in keys:
        for variant in VARIANTS[key[0]] if all_variants else ("main",):
            report = compile_entry(key, TABLE[key], variant)
            yield row(key, TABLE[key], variant, report) + _marked(report.problems(key[1]))


def fused_table(generations: Sequence[int], dtype: str) -> Iterator[str]:
    """Lines of Markdown: every launch of a fused kernel in a step whose hidden state is `dtype`."""
    yield _limits()
    yield ""
    yield "| kernel | constants | for | warps | registers | spilled bytes | shared bytes |"
    yield "|---|---|---|---|---|---|---|"
    for launch in launches(DTYPES[dtype]):
        kernel, _, _, meta = launch
        name = f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}"
        constants = " ".join(f"{name}={value}" for name, value in meta.items() if name not in OPTIONS)
        for generation in generations:
            report = compile_launch(launch, generation)
            cells = (name, constants, f"sm_{generation}", meta["num_warps"], report.registers, report.spilled)
            line = "| " + " | ".join(str(cell) for cell in (*cells, f"{report.shared:,}")) + " |"
            yield line + _marked(report.problems(generation, multiplies=False))


def _limits() -> str:
    limits = ", ".join(f"sm_{generation} {size:,}" for generation, size in SHARED_MEMORY.items())
    return f"{versions()}; limits: 255 registers, shared memory {limits} bytes."


def _marked(problems: Sequence[str]) -> str:
    return f" **{', '.join(problems)}**" if problems else ""


def main() -> None:
    """Print the table, or write it into the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=list(VARIANTS))
    parser.add_argument("--generation", type=int, choices=list(SHARED_MEMORY))
    parser.add_argument("--all", action="store_true", help="all variants")
    parser.add_argument("--write", action="store_true", help="replace the table in kernels/README.md")
    parser.add_argument("--fused", action="store_true", help="the fused kernels instead of attention's")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the hidden state, with --fused")
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("got TRITON_INTERPRET, with which nothing is compiled; need it unset; fix: unset it")
    if args.fused:
        for line in fused_table([args.generation] if args.generation else list(SHARED_MEMORY), args.dtype):
            print(line, flush=True)
        return
    keys = [k for k in TABLE if args.kernel in (None, k[0]) and args.generation in (None, k[1])]
    lines = []
    for line in table(keys, args.all):
        print(line, flush=True)
        lines.append(line)
    if args.write:
        head, rest = README.read_text().split(BEGIN)
        README.write_text("\n".join([head + BEGIN, *lines, END + rest.split(END)[1]]))


if __name__ == "__main__":
    main()
