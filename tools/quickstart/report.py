"""Does the quick start's distillation work? Samples teacher and student from the same noise, measures, draws, and judges.

    torchrun --standalone --nproc-per-node 2 tools/quickstart/report.py model_configs/quickstart.yaml

Writes report.md (the table and the verdicts, also printed), report.json, samples.png and samples.mp4 into <output_dir>/report,
and one MP4 for each sampler and picture column under videos/. The numbers are those of `tools.quickstart.judge`.

Shapes: C channels, T frames, H, W, N videos, F features.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rcm_megatron.config import RunConfig, load_config, validate
from rcm_megatron.data import media
from rcm_megatron.errors import CheckpointError, InputError
from rcm_megatron.evaluation.sets import frechet_distance
from rcm_megatron.files import save_safetensors
from rcm_megatron.inference.encoding import encode_captions, load_null_text
from rcm_megatron.inference.networks import (
    SampleBatches,
    init_parallel,
    load_network,
    resolve_checkpoint,
    student_sampling,
    teacher_sampling,
)
from rcm_megatron.inference.sampler import teacher_evaluations
from rcm_megatron.parallel.groups import ParallelGroups
from rcm_megatron.platform.device import this_device
from tools.quickstart import judge as digit_metrics
from tools.quickstart.digits import DIGIT_WORDS, DIRECTIONS, all_captions, caption_of, make_samples

REAL_SEED = 4_000_001
"""Of the held-out real videos that all others are compared with; the next seed draws the ones in the table."""
REAL_VIDEOS = 1000
COLUMNS = tuple(caption_of(digit, DIRECTIONS[digit % len(DIRECTIONS)]) for digit in (0, 3, 4, 5, 7, 8))
"""Captions of the picture."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way of sampling: a network, its number of steps, and for the teacher its guidance."""

    name: str
    weights: str
    steps: int
    guidance: float = 1.0

    @property
    def evaluations(self) -> int:
        return teacher_evaluations(self.steps, guidance=self.guidance)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table. Distance: Fréchet, to held-out real videos. Diversity: spread within captions, real videos 1."""

    name: str
    evaluations: int | None
    seconds_per_video: float | None
    distance: float
    accuracy: float
    diversity: float


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A claim about the student, its figure and its bound."""

    claim: str
    value: float
    bound: float
    at_most: bool

    @property
    def passed(self) -> bool:
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    def line(self) -> str:
        relation = "at most" if self.at_most else "at least"
        return f"{'pass' if self.passed else 'MISS'}  {self.claim}: {self.value:.2f} ({relation} {self.bound:g})"


def settings_of(run: RunConfig) -> Iterator[Setting]:
    """The teacher at its best and at few evaluations, with and without guidance; then the student."""
    best = run.sampling.guidance
    for steps, guidance in ((run.sampling.teacher_steps, best), (1, 1.0), (2, 1.0), (1, best), (4, 1.0), (2, best)):
        how = f"guidance {guidance:g}" if guidance > 1 else "no guidance"
        yield Setting(name=f"teacher, {_steps(steps)}, {how}", weights="teacher", steps=steps, guidance=guidance)
    for weights in ("ema", "student") if run.networks["student"].ema is not None else ("student",):
        for steps in run.sampling.student_steps:
            name = f"student{' EMA' if weights == 'ema' else ''}, {_steps(steps)}"
            yield Setting(name=name, weights=weights, steps=steps)


def _steps(count: int) -> str:
    return f"{count} step{'s' if count > 1 else ''}"


def sample_all(
    run: RunConfig,
    settings: Sequence[Setting],
    captions: Sequence[str],
    *,
    groups: ParallelGroups,
    checkpoint: Path,
    batch: int,
) -> list[tuple[Tensor, float]]:
    """(videos [N, C, T, H, W] in [-1, 1], seconds) of each setting, all from the same noise. Call on all ranks."""
    batches = SampleBatches(encode_captions(run, captions), load_null_text(run), run.sampling.seed, batch)
    network, loaded, sampled = None, None, []
    for setting in settings:
        if setting.weights != loaded:
            network, loaded = load_network(run, groups, weights=setting.weights, checkpoint=checkpoint), setting.weights
        if setting.weights == "teacher":
            sampling = teacher_sampling(run, steps=setting.steps, guidance=setting.guidance)
        else:
            sampling = student_sampling(run, steps=setting.steps)
        dist.barrier()
        start = time.perf_counter()
        videos_NCTHW = batches.all(network, sampling).clamp(-1, 1)
        sampled.append((videos_NCTHW, time.perf_counter() - start))
        if dist.get_rank() == 0:
            print(f"      {setting.name:<32} {len(captions)} videos in {sampled[-1][1]:6.1f} s", flush=True)
    return sampled


class Judge:
    """The classifier, and the held-out real videos that samples are compared with."""

    def __init__(self, *, cache: Path | None) -> None:
        self.classifier = digit_metrics.train_classifier(cache=cache)
        self.real_NCTHW, samples = make_samples(seed=REAL_SEED, start=0, count=REAL_VIDEOS, split="heldout")
        self.captions = [sample.caption for sample in samples]
        self.features_NF = digit_metrics.video_features(self.classifier, self.real_NCTHW)

    def row(self, name: str, videos_NCTHW: Tensor, captions: Sequence[str], *, evaluations=None, seconds=None) -> Row:
        features_NF = digit_metrics.video_features(self.classifier, videos_NCTHW)
        return Row(
            name=name,
            evaluations=evaluations,
            seconds_per_video=None if seconds is None else seconds / len(videos_NCTHW),
            distance=frechet_distance(features_NF, self.features_NF),
            accuracy=digit_metrics.captioned_digit_accuracy(self.classifier, videos_NCTHW, captions),
            diversity=digit_metrics.caption_diversity(
                features_NF, captions, real_features_MF=self.features_NF, real_captions=self.captions
            ),
        )

    def real_row(self, count: int) -> Row:
        """As many other held-out videos as were sampled: what a perfect sampler would get."""
        videos_NCTHW, samples = make_samples(seed=REAL_SEED + 1, start=0, count=count, split="heldout")
        return self.row("real, held-out", videos_NCTHW, [sample.caption for sample in samples])


def judge_student(settings: Sequence[Setting], rows: Sequence[Row], *, weights: str) -> list[Verdict]:
    """The quick start's claims. At a number of evaluations the teacher is taken at its better guidance."""
    pairs = list(zip(settings, rows, strict=True))
    best = rows[0]
    verdicts = []
    for evaluations in (1, 2):
        teacher = min(r.distance for s, r in pairs if s.weights == "teacher" and s.evaluations == evaluations)
        student = next(r.distance for s, r in pairs if s.weights == weights and s.steps == evaluations)
        claim = f"distance, student at {evaluations} over teacher at {evaluations}: {student:.0f} / {teacher:.0f}"
        verdicts.append(Verdict(claim=claim, value=student / teacher, bound=0.5, at_most=True))
    student = next(r for s, r in pairs if s.weights == weights and s.steps == 4)
    for what, bound in (("accuracy", 0.9), ("diversity", 0.7)):
        ours, theirs = getattr(student, what), getattr(best, what)
        claim = f"{what}, student at 4 over teacher at {best.evaluations}: {ours:.2f} / {theirs:.2f}"
        verdicts.append(Verdict(claim=claim, value=ours / theirs, bound=bound, at_most=False))
    return verdicts


def table(rows: Sequence[Row], *, best: Row) -> str:
    """Markdown, aligned for a terminal too."""
    head = (
        "sampler",
        "network evaluations",
        "s/video",
        "distance to real",
        "digit accuracy",
        "diversity",
        "of teacher's",
    )
    lines = [head]
    for row in rows:
        evaluations = "" if row.evaluations is None else str(row.evaluations)
        seconds = "" if row.seconds_per_video is None else f"{row.seconds_per_video:.3f}"
        numbers = (
            f"{row.distance:.0f}",
            f"{row.accuracy:.2f}",
            f"{row.diversity:.2f}",
            f"{row.diversity / best.diversity:.2f}",
        )
        lines.append((row.name, evaluations, seconds, *numbers))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    aligned = [
        [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))] for line in lines
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in (aligned[0], rule, *aligned[1:]))


def picture_rows(
    settings: Sequence[Setting],
    rows: Sequence[Row],
    videos: Sequence[Tensor],
    captions: Sequence[str],
    *,
    judge: Judge,
    weights: str,
) -> list[tuple[str, Tensor]]:
    """(label, videos of COLUMNS) of: real videos, the teacher at its best and at 1, 2, 4 evaluations, the student."""
    real = torch.stack([judge.real_NCTHW[judge.captions.index(caption)] for caption in COLUMNS])
    chosen = [0]
    for evaluations in (1, 2, 4):
        same = [i for i, s in enumerate(settings) if s.weights == "teacher" and s.evaluations == evaluations]
        chosen.append(min(same, key=lambda i: rows[i].distance))
    chosen += [i for i, setting in enumerate(settings) if setting.weights == weights]
    where = torch.tensor([captions.index(caption) for caption in COLUMNS])
    shown = [("real, held-out", real)]
    for i in chosen:
        plural = "s" if rows[i].evaluations > 1 else ""
        who = "teacher" if settings[i].weights == "teacher" else "student"
        shown.append((f"{who}, {rows[i].evaluations} evaluation{plural}", videos[i][where]))
    return shown


def draw(folder: Path, shown: Sequence[tuple[str, Tensor]], *, fps: int) -> None:
    """samples.png (frames from left to right), samples.mp4 (all rows moving), and a moving row an MP4 under videos/."""
    title = "Moving digits: one caption and one noise a column, one sampler a row"
    picture = media.still_grid(shown, captions=COLUMNS, title=f"{title}; 4 frames from left to right", scale=4)
    media.write_png(folder / "samples.png", picture)
    moving_THWC = media.moving_grid(shown, captions=COLUMNS, title=title, scale=9)
    media.write_mp4(folder / "samples.mp4", moving_THWC, fps=fps, loops=6)
    for label, videos in shown:
        path = folder / "videos" / (label.replace(",", "").replace(" ", "_") + ".mp4")
        moving_THWC = media.moving_grid([(label, videos)], captions=COLUMNS, title="", scale=9)
        media.write_mp4(path, moving_THWC, fps=fps, loops=6)


def write_report(
    folder: Path, rows: Sequence[Row], verdicts: Sequence[Verdict], *, run: RunConfig, facts: dict
) -> None:
    """Print and write the table and the verdicts."""
    text = table(rows, best=rows[0]) + "\n\n" + "\n".join(verdict.line() for verdict in verdicts)
    print(f"\n{text}\n")
    note = " · ".join(f"{name}: {value}" for name, value in facts.items())
    (folder / "report.md").write_text(f"{text}\n\n{note}\n")
    record = {
        "facts": facts,
        "rows": [dataclasses.asdict(row) for row in rows],
        "verdicts": [dataclasses.asdict(verdict) | {"passed": verdict.passed} for verdict in verdicts],
        "sampling": dataclasses.asdict(run.sampling),
    }
    (folder / "report.json").write_text(json.dumps(record, indent=2) + "\n")


def write_for_evaluation(folder: Path, judge: Judge) -> None:
    """What `rcm evaluate` is to sample and compare with: a caption of each digit, and features of the held-out real videos."""
    captions = [caption_of(digit, DIRECTIONS[digit % len(DIRECTIONS)]) for digit in range(len(DIGIT_WORDS))]
    (folder / "captions.txt").write_text("\n".join(captions) + "\n")
    prompts = {"prompts": json.dumps(judge.captions)}
    save_safetensors({"features": judge.features_NF.contiguous()}, folder / "real.safetensors", metadata=prompts)


def report(run: RunConfig, arguments: argparse.Namespace) -> bool:
    """Everything; True when every claim about the student holds."""
    copies = max(2, arguments.videos // len(all_captions()))  # diversity compares videos of one caption
    captions = [caption for caption in all_captions() for _ in range(copies)]
    settings = list(settings_of(run))
    groups = init_parallel(run)
    checkpoint = resolve_checkpoint(run, arguments.checkpoint)
    sampled = sample_all(run, settings, captions, groups=groups, checkpoint=checkpoint, batch=arguments.batch)
    world, is_first = dist.get_world_size(), dist.get_rank() == 0
    dist.destroy_process_group()
    if not is_first:
        return True
    torch.set_num_threads(torch.get_num_threads() * world)  # the other processes are done
    start = time.perf_counter()
    folder = Path(run.output_dir) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    judge = Judge(cache=arguments.classifier_cache)
    print(f"      {'classifier, on real digits':<32} in {time.perf_counter() - start:17.1f} s")
    rows = [
        judge.row(setting.name, videos, captions, evaluations=setting.evaluations, seconds=seconds)
        for setting, (videos, seconds) in zip(settings, sampled, strict=True)
    ]
    verdicts = judge_student(settings, rows, weights=arguments.weights)
    layout = f"tp={run.parallel.tp} ring={run.parallel.ring} ulysses={run.parallel.ulysses}"
    facts = {"checkpoint": str(checkpoint), "videos": len(captions), "processes": world, "layout": layout}
    facts |= {"device": str(this_device()), "torch": torch.__version__}
    write_report(folder, [*rows, judge.real_row(len(captions))], verdicts, run=run, facts=facts)
    videos = [videos for videos, _ in sampled]
    shown = picture_rows(settings, rows, videos, captions, judge=judge, weights=arguments.weights)
    draw(folder, shown, fps=run.sampling.fps)
    write_for_evaluation(folder, judge)
    return all(verdict.passed for verdict in verdicts)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--videos", type=int, default=240, help="of each sampler, spread evenly over the captions")
    parser.add_argument("--weights", choices=("ema", "student"), default="ema", help="the student that is judged")
    parser.add_argument("--checkpoint", type=Path, help="default: the run's latest")
    parser.add_argument("--batch", type=int, default=120)
    parser.add_argument("--classifier-cache", type=Path, metavar="FILE", help="read the classifier there, or write it")
    parser.add_argument("--strict", action="store_true", help="exit status 1 when a claim does not hold")
    arguments = parser.parse_args()
    run = load_config(arguments.config, arguments.overrides)
    validate(run, int(os.environ.get("WORLD_SIZE", "1")))
    try:
        held = report(run, arguments)
    except (CheckpointError, InputError) as error:
        raise SystemExit(f"quickstart_report: {error}") from None
    return 0 if held or not arguments.strict else 1


if __name__ == "__main__":
    raise SystemExit(main())
