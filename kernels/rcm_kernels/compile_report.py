"""What the compilers make of every shipped configuration, without a GPU: registers, spills, shared memory.

    python -m rcm_kernels.compile_report                      # the table, of what `VARIANTS` calls the main variant
    python -m rcm_kernels.compile_report --all --generation 90
    python -m rcm_kernels.compile_report --write              # into kernels/README.md

Triton compiles ahead of time for an architecture, and its own ptxas reports (-v) on the result.
"""

import argparse
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from rcm_kernels.configs import SHARED_MEMORY, TABLE, narrower
from rcm_kernels.flash_attention import triton_impl as plain
from rcm_kernels.flash_attention_jvp import triton_impl as jvp

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- compile_report: begin -->", "<!-- compile_report: end -->"
MATMUL = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
SERIALISED = "wgmma.mma_async instructions are serialized"

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
    """Bytes stored and loaded because registers ran out."""
    shared: int
    tensor_memory: int
    """Columns, of 512 (Blackwell)."""
    serialised: bool
    """ptxas waits for every wgmma before the next instruction."""
    matmuls: int
    """The generation's own matmul instructions in the code."""

    def problems(self, generation):
        """What must not be shipped, in words."""
        limit, found = SHARED_MEMORY[generation], []
        if self.spilled:
            found.append(f"spills {self.spilled} bytes")
        if self.shared > limit:
            found.append(f"needs {self.shared} bytes of shared memory, limit {limit}")
        if self.tensor_memory > 512:
            found.append(f"needs {self.tensor_memory} columns of tensor memory, limit 512")
        if self.serialised:
            found.append("wgmma serialised")
        if self.matmuls == 0:
            found.append(f"has no {MATMUL[generation]} instruction")
        if self.registers < 32:
            found.append(f"uses {self.registers} registers: the body was removed")
        return found


def versions():
    """Of the compilers."""
    names = []
    for generation in SHARED_MEMORY:
        tool = get_ptxas(generation)
        name = f"{Path(tool.path).name} {tool.version}"
        names += [] if name in names else [name]
    return f"Triton {triton.__version__}, {', '.join(names)}"


def compile_entry(key, config, variant="main"):
    """The Report on configuration `config` for table key (kernel, generation, head dim, kind)."""
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
    return _compile(fn, pointers, constants, generation, config)


def _call(kernel, variant, dtype):
    """(kernel function, type per pointer, constants) as a launcher would call it."""
    if kernel == "jvp":
        pointers = dict.fromkeys(("q", "k", "v", "tq", "tk", "tv"), dtype)
        pointers |= dict.fromkeys(("o", "to", "lse", "mu", "carry_o", "carry_to", "carry_lse", "carry_mu"), "fp32")
        if variant in ("one rank", "cross"):
            pointers |= dict.fromkeys(("o", "to"), dtype)
        no_carry = variant in ("first step", "one rank", "cross")
        constants = {"HAS_TK": variant != "cross", "SAME_STRIDES": variant != "other strides"}
        constants |= {"HAS_CARRY": not no_carry, "CHUNKED": variant == "chunked"}
        absent = ("tk", "tv") if variant == "cross" else ()
        absent += tuple(x for x in pointers if x.startswith("carry")) if no_carry else ()
        return jvp.forward_kernel, pointers, constants | dict.fromkeys(absent)
    if kernel == "forward":
        return plain.forward_kernel, dict.fromkeys(("q", "k", "v", "o"), dtype) | {"lse": "fp32"}, {}
    pointers = dict.fromkeys(("stay1", "stay2", "pass1", "pass2"), dtype)
    pointers |= dict.fromkeys(("lse", "delta", "grad1", "grad2"), "fp32")
    constants = {"KEYS_STAY": kernel == "dkdv", "ACCUMULATE": kernel == "dq"}
    return plain.backward_kernel, pointers, constants | ({"grad2": None} if kernel == "dq" else {})


def _compile(fn, pointers, constants, generation, config):
    types, divisible = {}, {}
    for index, name in enumerate(fn.arg_names):
        if name in constants:
            types[name] = "constexpr"
            continue
        types[name] = "*" + pointers[name] if name in pointers else "fp32" if name == "scale" else "i32"
        if name in pointers or name.endswith(("_s", "_b", "_n")):
            divisible[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn, types, constexprs=constants, attrs=divisible)
    options = {"num_warps": config.warps, "num_stages": config.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", generation, 32), options=options)
    log = _ptxas(compiled.asm["ptx"], generation)
    used = re.search(r"Used (\d+) registers", log)
    spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    tensor_memory = getattr(compiled.metadata, "tmem_size", 0) or 0
    matmuls = compiled.asm["ptx"].count(MATMUL[generation])
    return Report(
        int(used[1]), sum(map(int, spilled)), compiled.metadata.shared, tensor_memory, SERIALISED in log, matmuls
    )


def _ptxas(ptx, generation):
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


def row(key, config, variant, report):
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


def table(keys, all_variants):
    """Lines of Markdown."""
    yield f"{versions()}; limits: 255 registers, shared memory {', '.join(f'sm_{g} {n:,}' for g, n in SHARED_MEMORY.items())} bytes."
    yield ""
    yield "| kernel | for | head dim | type | variant | rows × rows of a step | registers | spilled bytes | shared bytes |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for key in keys:
        for variant in VARIANTS[key[0]] if all_variants else ("main",):
            report = compile_entry(key, TABLE[key], variant)
            wrong = report.problems(key[1])
            yield row(key, TABLE[key], variant, report) + (f" **{', '.join(wrong)}**" if wrong else "")


def main():
    """Print the table, or write it into the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=list(VARIANTS))
    parser.add_argument("--generation", type=int, choices=list(SHARED_MEMORY))
    parser.add_argument("--all", action="store_true", help="all variants")
    parser.add_argument("--write", action="store_true", help="replace the table in kernels/README.md")
    args = parser.parse_args()
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
