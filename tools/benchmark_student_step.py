"""A whole student step of Wan2.1-1.3B at 480p on one GPU, with and without each fused operation: seconds, MFU, peak memory.

    python tools/benchmark_student_step.py --output runs/student_step.json           # sCM: teacher, dual pass, backward, update
    python tools/benchmark_student_step.py --step student --settings none all        # rCM's student step: sCM and DMD

Networks, objectives, optimizer and EMA are those of training (tools/scaling_rank.py), weights and data random, batch 1. The settings are
PyTorch's rules for all operations (`none`), all fused (`all`), and all but one (`all-gelu_tanh` …), whose difference from `all` is what
that kernel brings. They take turns; seconds are medians. MFU counts useful FLOPs as the training metrics do (training/flops.py).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from rcm_kernels import flash_attention, flash_attention_jvp, fused  # noqa: E402
from rcm_megatron.config import load_config  # noqa: E402
from rcm_megatron.platform.device import init_distributed, this_device  # noqa: E402
from rcm_megatron.platform.megatron import prepare_megatron  # noqa: E402
from tools.scaling_points import STEPS, make_points, plan_of  # noqa: E402

SETTINGS = ("none", "all", *(f"all-{op}" for op in fused.OPS))


def select(setting: str) -> None:
    """`none`, `all`, or all operations but one."""
    left_out = setting.removeprefix("all-")
    names = [op for op in fused.OPS if op != left_out]
    fused.select_ops(",".join(names) if left_out != setting else setting)


class Bench:
    """One rank with its networks, and the step that is timed."""

    def __init__(self, args: argparse.Namespace) -> None:
        from rcm_megatron.training.flops import network_flops, peak_tflops, step_flops
        from tools.scaling_rank import Rank

        # one GPU, one sample; what the configuration says of networks, objectives and memory stays
        one = ["parallel={}", "trainer.global_batch_size=1", "trainer.micro_batch_size=1"]
        run = load_config(args.config, [*one, *args.overrides])
        (point,) = make_points(run, {"strong": ["dp=1"]}, steps=[args.step], rollout_steps=2)
        self.name, self.run = args.step, point.run
        self.rank = Rank(point)
        step = plan_of(point.run.stages[0], rollout_steps=point.rollout_steps)
        networks = dict.fromkeys(point.run.roles, network_flops(run.model, run.latent))
        settings = {"distillation": point.run.distillation, "objectives": point.run.objectives}
        self.tflop = step_flops(networks, step, **settings) / 1e12
        self.peak_tflops = peak_tflops(run)

    def measure(self, setting: str) -> dict[str, Any]:
        """Seconds of one step by phase, and the peak of the device's memory in it."""
        select(setting)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        measured = self.rank.measure(self.name)
        return measured | {"peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None}

    def kernels(self) -> dict[str, str]:
        from rcm_megatron.dtypes import DTYPES

        dtype = DTYPES[self.run.precision.params_dtype]
        q = torch.empty(1, 1, 1, self.run.model.head_dim, dtype=dtype, device=this_device())
        return {
            "attention": flash_attention.backend_for(q).name,
            "attention_with_tangent": flash_attention_jvp.backend_for(q),
        }

    def row(self, setting: str, repeats: list[dict[str, Any]]) -> dict[str, Any]:
        seconds = statistics.median(r["seconds"] for r in repeats)
        tflops = self.tflop / seconds
        phases = {name: statistics.median(r["phases"][name] for r in repeats) for name in repeats[0]["phases"]}
        return {
            "fused": setting,
            "median_seconds": seconds,
            "seconds": [r["seconds"] for r in repeats],
            "tflops": tflops,
            "mfu": None if self.peak_tflops is None else tflops / self.peak_tflops,
            "peak_gib": repeats[-1]["peak_gib"],
            "phases": phases,
        }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    bench = Bench(args)
    repeats: dict[str, list[dict[str, Any]]] = {setting: [] for setting in args.settings}
    for setting in args.settings:
        bench.measure(setting)  # compiles what is new
    for repeat in range(args.repeats):
        for setting, measured in repeats.items():
            measured.append(bench.measure(setting))
            print(f"{repeat + 1}/{args.repeats} {setting}: {measured[-1]['seconds']:.3f} s", flush=True)
    model, latent = bench.run.model, bench.run.latent
    return {
        "step": args.step,
        "tokens": latent.num_tokens(model.patch_size),
        "latent_CTHW": latent.shape_CTHW,
        "config": args.config,
        "overrides": args.overrides,
        "useful_tflop": bench.tflop,
        "kernels": bench.kernels(),
        "settings": [bench.row(setting, measured) for setting, measured in repeats.items()],
    }


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| fused | seconds | TFLOP/s | MFU | peak GiB |", "| --- | ---: | ---: | ---: | ---: |"]
    for row in result["settings"]:
        mfu = "" if row["mfu"] is None else f"{100 * row['mfu']:.1f} %"
        peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
        lines.append(f"| {row['fused']} | {row['median_seconds']:.3f} | {row['tflops']:.3g} | {mfu} | {peak} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "model_configs" / "wan2.1_t2v_1.3b_480p.yaml"))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the configuration, e.g. latent.frames=5")
    parser.add_argument("--step", choices=STEPS, default="scm", help="student: sCM and DMD")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available() and args.settings != ["none"]:
        sys.exit("got no CUDA device; need one for the fused kernels; fix: run this on a GPU, or --settings none")
    prepare_megatron()
    init_distributed()
    from tools.measuring import provenance

    result = measure(args) | {"provenance": provenance()}
    print(table(result))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
