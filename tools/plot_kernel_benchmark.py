"""Draw the CSV of `python -m rcm_kernels.benchmark`: TFLOP/s per case and implementation, with the measured matmul peak."""

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot(source: Path, target: Path) -> None:
    """One group of bars per case; the title says which GPU, versions and commit were measured."""
    with source.open() as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise ValueError(f"got no row in {source}; need the CSV of rcm_kernels.benchmark; fix: run that first")
    cases = list(dict.fromkeys(row["case"] for row in rows))
    implementations = list(dict.fromkeys(row["implementation"] for row in rows))
    width = 0.8 / len(implementations)
    figure, axes = plt.subplots(figsize=(2 + 1.4 * len(cases), 5), layout="constrained")
    for i, implementation in enumerate(implementations):
        chosen = {row["case"]: float(row["tflops"]) for row in rows if row["implementation"] == implementation}
        places = [cases.index(case) + (i + 0.5) * width - 0.4 for case in chosen]
        axes.bar(places, chosen.values(), width, label=implementation)
    first = rows[0]
    axes.axhline(float(first["matmul_tflops"]), color="black", linestyle="--", label="torch.matmul, 8192³")
    axes.set_xticks(range(len(cases)), cases, rotation=20, ha="right")
    axes.set_ylabel("TFLOP/s")
    where = (
        f"{first['gpu']}, {first['dtype']}, torch {first['torch']}, Triton {first['triton']}, commit {first['commit']}"
    )
    axes.set_title(where, fontsize=9)
    axes.legend(fontsize=8)
    figure.savefig(target, dpi=150)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--output", type=Path, help="default: the CSV's name with .png")
    args = parser.parse_args()
    plot(args.csv, args.output or args.csv.with_suffix(".png"))


if __name__ == "__main__":
    main()
