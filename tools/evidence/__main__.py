"""Trains every method on the mixture and writes docs/evidence.md, its figures and pictures.

python -m tools.evidence [--updates 3000] [--output docs/evidence]
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from tools.evidence.mixture import Mixture
from tools.evidence.study import METHODS, RCM, STEPS, SWEEP, Outcome, Rows, Sizes, study
from tools.measuring import ROOT, provenance

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}
"""Seeds -> Student's t of a two-sided interval of 95 %."""
QUANTITIES = {"modes": ("modes of 25", 1), "kl": ("KL", 3), "inside": ("inside", 3), "spread": ("spread", 2)}
"""-> what a table calls it, decimals."""
Found = Mapping[str, Mapping[str, Outcome]]


def mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval over seeds."""
    half = T_95[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), half


def cell(rows: Rows, quantity: str) -> str:
    mean, half = mean_and_half([row[quantity] for row in rows])
    digits = QUANTITIES[quantity][1]
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def table(found: Found, moment: str) -> str:
    heads = ["method", "updates", "passes", "steps", *(title for title, _ in QUANTITIES.values())]
    lines = ["| " + " | ".join(heads) + " |", "| --- " + "| ---: " * (len(heads) - 1) + "|"]
    for name, outcomes in found.items():
        if name == "teacher":
            continue
        outcome = outcomes[moment]
        for steps in STEPS:
            first = [name, f"{outcome.updates:,}", f"{outcome.cost:,.0f}"] if steps == STEPS[0] else ["", "", ""]
            numbers = [cell(outcome.rows[steps], quantity) for quantity in QUANTITIES]
            lines.append("| " + " | ".join([*first, str(steps), *numbers]) + " |")
    return "\n".join(lines)


def teachers(found: Found) -> str:
    lines = ["| sampler | evaluations | " + " | ".join(title for title, _ in QUANTITIES.values()) + " |"]
    lines.append("| --- | ---: " + "| ---: " * len(QUANTITIES) + "|")
    for name, outcome in found["teacher"].items():
        for steps, rows in outcome.rows.items():
            numbers = " | ".join(cell(rows, quantity) for quantity in QUANTITIES)
            lines.append(f"| Euler, {name} velocity | {steps} | {numbers} |")
    return "\n".join(lines)


# ---- claims


def compared(a: Rows, b: Rows, quantity: str) -> tuple[str, float, float]:
    """How ``a`` stands to ``b``: `above`, `below`, or `equal` where the interval of the seeds' differences holds 0; and both means."""
    differences = [x[quantity] - y[quantity] for x, y in zip(a, b, strict=True)]
    mean, half = mean_and_half(differences)
    verdict = "equal" if abs(mean) <= half else "above" if mean > 0 else "below"
    return verdict, *(statistics.fmean([row[quantity] for row in rows]) for rows in (a, b))


def claims(found: Found, moment: str) -> Iterator[tuple[str, str, str]]:
    """(What is claimed, reproduced or not, numbers), of one step."""
    one = {name: outcomes[moment].rows[1] for name, outcomes in found.items() if name != "teacher"}
    rcm = one[f"rCM {RCM:g}"]
    wide = compared(one["sCM"], one["DMD"], "kl")
    sharp = compared(one["sCM"], one["DMD"], "inside")
    yield _said("sCM covers the modes better than DMD", wide, "below", "KL")
    yield _said("sCM lacks detail: fewer of its samples are at a mode than of DMD's", sharp, "below", "inside")
    narrow = compared(one["DMD"], found["teacher"]["exact"].rows[50], "kl")
    yield _said("DMD seeks modes: it is further from the weights than the exact teacher", narrow, "above", "KL")
    yield _said("rCM covers no worse than sCM", compared(rcm, one["sCM"], "kl"), "below or equal", "KL")
    yield _said("rCM is no less sharp than DMD", compared(rcm, one["DMD"], "inside"), "above or equal", "inside")
    yield _said("rCM covers better than DMD", compared(rcm, one["DMD"], "kl"), "below", "KL")
    four = found[f"rCM {RCM:g}"][moment].rows[4]
    teacher = found["teacher"]["learned"].rows[50]
    fewer = compared(four, teacher, "inside")
    yield _said("four steps of rCM are as sharp as 50 of the network it starts from", fewer, "above or equal", "inside")
    yield _said("and cover as well", compared(four, teacher, "kl"), "below or equal", "KL")


def _said(claim: str, result: tuple[str, float, float], wanted: str, quantity: str) -> tuple[str, str, str]:
    verdict, first, second = result
    return (
        claim,
        "reproduced" if verdict in wanted.split(" or ") else "not",
        f"{quantity} {first:.3f}, {second:.3f}: {verdict}",
    )


# ---- pictures


def draw(found: Found, path: Path) -> None:
    """Samples of one step, the first seed's; and what the weight of DMD does."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    mixture = Mixture.unequal()
    truth = mixture.sample(4096, generator=torch.Generator().manual_seed(1))
    names = [name for name in found if name != "teacher"]
    columns = 4
    rows = -(-(len(names) + 2) // columns)
    figure, panels = pyplot.subplots(rows, columns, figsize=(4 * columns, 4 * rows), layout="constrained")
    clouds = {"truth": truth, **{name: found[name]["updates"].first_seed_N2 for name in names}}
    for panel, (name, x_N2) in zip(panels.flat, clouds.items(), strict=False):
        panel.scatter(*x_N2.T, s=1, alpha=0.3, color="#1f4e79")
        panel.set(title=name, xlim=(-2, 2), ylim=(-2, 2), xticks=[], yticks=[])
    for panel in panels.flat[len(clouds) : -1]:
        panel.axis("off")
    _draw_sweep(panels.flat[-1], found)
    figure.suptitle("one step, equal updates, first seed")
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _draw_sweep(panel, found: Found) -> None:
    other = panel.twinx()
    for axis, quantity, colour in ((panel, "inside", "#548235"), (other, "kl", "#c00000")):
        values = [found[f"rCM {weight:g}"]["updates"].rows[1] for weight in SWEEP]
        means, halves = zip(*(mean_and_half([row[quantity] for row in rows]) for rows in values), strict=True)
        axis.errorbar(SWEEP, means, yerr=halves, color=colour, marker="o", label=QUANTITIES[quantity][0])
        axis.set_ylabel(QUANTITIES[quantity][0], color=colour)
    panel.set(xscale="log", xlabel="weight of DMD beside sCM's 1", title="rCM")


DOCUMENT = """# Evidence: what the paper claims, where the truth is known

25 Gaussians of unequal weight (1 to 10) in two dimensions, whose score is known exactly: it is the teacher. Students are small networks
that begin as one that has learned the teacher's velocity; losses, times, rollouts and samplers are this program's
(`rcm_megatron/diffusion`). What holds here need not hold of videos: there is no caption, no guidance, and the teacher has no error.
Written by

    {command}

on {date}: {cpu}, {cores} cores, torch {torch}, commit {commit}; {minutes:.0f} minutes. {seeds} seeds, batches of {batch}; ± is half of a
95 % interval over the seeds. All figures: evidence.json.

*modes*: those with at least a fifth of their samples. *KL*: of the true weights to the samples' (0.003 of samples of the truth).
*inside*: share of the samples within 3 standard deviations of a mode (0.989 of the truth's). *spread*: standard deviation around a mode
of those inside, of the true one. *passes*: forward passes of a batch, a backward counting 2 and a tangent 1; the fake score's included.

![samples of one step](evidence.png)

## Teacher

{teachers}

## Claims

Of one step; *equal*: the interval of the seeds' differences holds 0. rCM is sCM + {rcm:g} DMD.

{claims}

That sCM's errors grow with the scale of the network cannot be tested here, nor what eyes say of videos.

## Equal updates of the student

{updates}

## Equal passes

{cost}
"""


def claims_table(found: Found) -> str:
    lines = ["| claim | equal updates | | equal passes | |", "| --- | --- | --- | --- | --- |"]
    for (claim, *first), (_, *second) in zip(claims(found, "updates"), claims(found, "cost"), strict=True):
        lines.append("| " + " | ".join([claim, *first, *second]) + " |")
    return "\n".join(lines)


def plain(found: Found) -> dict:
    """For JSON."""
    return {
        name: {moment: {"updates": o.updates, "passes": o.cost, "seeds": o.rows} for moment, o in outcomes.items()}
        for name, outcomes in found.items()
    }


def main() -> None:
    sizes = Sizes()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=sizes.updates, help="of the student")
    parser.add_argument("--pretraining", type=int, default=sizes.pretraining)
    parser.add_argument("--seeds", type=int, default=sizes.seeds, choices=sorted(T_95))
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "evidence", help="without suffix")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = Sizes(seeds=args.seeds, pretraining=args.pretraining, updates=args.updates)
    began, source = time.perf_counter(), provenance()
    found = study(METHODS, sizes, say=lambda line: print(f"{time.perf_counter() - began:6.0f} s  {line}", flush=True))
    args.output.with_suffix(".json").write_text(
        json.dumps({"provenance": source, "found": plain(found)}, indent=1) + "\n"
    )
    draw(found, args.output.with_suffix(".png"))
    text = DOCUMENT.format(
        **{key: source[key] for key in ("command", "cpu", "cores", "torch", "commit")},
        date=time.strftime("%Y-%m-%d"),
        minutes=(time.perf_counter() - began) / 60,
        seeds=sizes.seeds,
        batch=sizes.batch,
        rcm=RCM,
        teachers=teachers(found),
        claims=claims_table(found),
        updates=table(found, "updates"),
        cost=table(found, "cost"),
    )
    args.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
