"""Train the quick start's teacher: a small Wan2.1 transformer, on moving digits, by rectified-flow matching.

    OMP_NUM_THREADS=1 python tools/quickstart/train_teacher.py --output /tmp/teacher --minutes 60

Runs on one CPU core. A run that was stopped goes on when the same command is given again. `--output` receives
`state.pt` (to resume), `log.jsonl`, and `diffusers/`, the averaged weights in the layout that `from_pretrained` reads;
that folder is what the repository holds as `model_configs/quickstart_teacher`.

Shapes: B batch, C channels, T frames, H, W, L text positions, D text width.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from rcm_megatron.models.encoders import PixelVideoEncoder, WordTextEncoder  # noqa: E402
from tools.quickstart.digits import make_samples  # noqa: E402

LOG_STEPS = 50
MODEL = {
    "patch_size": (1, 4, 4),  # 64 tokens a video
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 1,
    "out_channels": 1,
    "text_dim": 32,
    "freq_dim": 64,
    "ffn_dim": 384,
    "num_layers": 4,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "rope_max_seq_len": 64,
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One training run. The learning rates follow the share of `minutes` used, so a slow machine trains less, not worse."""

    output: Path
    minutes: float
    """Training time over all resumed parts, compilation and checkpoints included."""
    batch: int = 32
    muon_rate: float = 0.02
    """Peak rate of the blocks' matrices (Muon)."""
    adam_rate: float = 2e-3
    """Peak rate of everything else (AdamW)."""
    warmup_steps: int = 100
    dropout: float = 0.1
    """Share of captions replaced by "", which teaches the unconditional branch of guidance."""
    shift: float = 2.0
    """Moves training times towards noise: s = shift u / (1 + (shift - 1) u), u = sigmoid(spread * normal)."""
    spread: float = 1.2
    ema_decay: float = 0.999
    seed: int = 0
    checkpoint_minutes: float = 4.0
    compile: bool = True


def flow_times(count: int, *, shift: float, spread: float, generator: torch.Generator) -> Tensor:
    """Shifted logit-normal rectified-flow times s in (0, 1), [B]. SD3 (arXiv 2403.03206), Sec. 3.1 and Eq. 23."""
    u_B = torch.sigmoid(spread * torch.randn(count, generator=generator))
    return shift * u_B / (1.0 + (shift - 1.0) * u_B)


def flow_matching_loss(velocity_BCTHW: Tensor, x0_BCTHW: Tensor, noise_BCTHW: Tensor) -> Tensor:
    """Mean squared error to v = noise - x0, the velocity of xt = (1 - s) x0 + s noise. Flow matching (arXiv 2210.02747)."""
    return (velocity_BCTHW.float() - (noise_BCTHW - x0_BCTHW)).square().mean()


def make_optimizers(model: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' weight matrices, AdamW for the rest.

    This model on a harder version of the videos (any place, four directions), loss after 250 steps: 0.465 so, 0.502 with
    AdamW alone at `adam_rate`, for 4% more time.
    """
    is_matrix = {id(p) for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2}
    matrices = [p for p in model.parameters() if id(p) in is_matrix]
    others = [p for p in model.parameters() if id(p) not in is_matrix]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=settings.adam_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        torch.optim.Muon(matrices, lr=settings.muon_rate, weight_decay=0.01, momentum=0.95),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def rate_factor(*, step: int, share_used: float, warmup_steps: int) -> float:
    """Share of the peak learning rate: linear warm-up over steps, then half a cosine over the time budget, down to 1%."""
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(share_used, 1.0)))
    return min(1.0, (step + 1) / warmup_steps) * max(cosine, 0.01)


class Trainer:
    """Model, its running average, optimizers and counters of one run; saves and restores all of them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        torch.manual_seed(settings.seed)
        self.model = WanTransformer3DModel(**MODEL)
        self.average = WanTransformer3DModel(**MODEL).requires_grad_(False)
        self.average.load_state_dict(self.model.state_dict())
        self.forward = torch.compile(self.model) if settings.compile else self.model
        self.optimizers = make_optimizers(self.model, settings)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.video_encoder, self.text_encoder = PixelVideoEncoder(), WordTextEncoder()
        self.step, self.seconds, self.recent_loss = 0, 0.0, float("nan")

    def batch(self) -> tuple[Tensor, Tensor]:
        """The next latents [B, C, T, H, W] and caption embeddings [B, L, D]; video number = step * B + row."""
        count = self.settings.batch
        video_BCTHW, samples = make_samples(seed=self.settings.seed, start=self.step * count, count=count)
        dropped_B = torch.rand(count, generator=self.generator) < self.settings.dropout
        captions = ["" if dropped else s.caption for dropped, s in zip(dropped_B.tolist(), samples, strict=True)]
        return self.video_encoder.encode(video_BCTHW), self.text_encoder.encode(captions)

    def train_step(self) -> float:
        """One update of the weights and of their average; returns the loss."""
        x0_BCTHW, text_BLD = self.batch()
        s_B = flow_times(
            len(x0_BCTHW), shift=self.settings.shift, spread=self.settings.spread, generator=self.generator
        )
        noise_BCTHW = torch.randn(x0_BCTHW.shape, generator=self.generator)
        xt_BCTHW = torch.lerp(x0_BCTHW, noise_BCTHW, s_B.view(-1, 1, 1, 1, 1))
        (velocity_BCTHW,) = self.forward(
            hidden_states=xt_BCTHW, timestep=1000.0 * s_B, encoder_hidden_states=text_BLD, return_dict=False
        )
        loss = flow_matching_loss(velocity_BCTHW, x0_BCTHW, noise_BCTHW)
        loss.backward()
        self._update()
        return loss.item()

    def _update(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        share_used = self.seconds / (60.0 * self.settings.minutes)
        factor = rate_factor(step=self.step, share_used=share_used, warmup_steps=self.settings.warmup_steps)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        # A young average forgets its random start faster than `ema_decay` would.
        decay = min(self.settings.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1.0 - decay)

    def save(self) -> None:
        """Write `state.pt` (through a rename, so that a killed run keeps the last one) and the diffusers folder."""
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generator": self.generator.get_state(),
            "counters": (self.step, self.seconds, self.recent_loss),
        }
        partial = self.settings.output / "state.pt.partial"
        torch.save(state, partial)
        partial.replace(self.settings.output / "state.pt")
        self.export(self.settings.output / "diffusers")

    def load(self, path: Path) -> None:
        """Take up the run that `save` wrote at `path`."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.generator.set_state(state["generator"])
        self.step, self.seconds, self.recent_loss = state["counters"]

    def export(self, folder: Path) -> None:
        """config.json and fp32 diffusion_pytorch_model.safetensors of the averaged weights, and a README that says whence."""
        self.average.save_pretrained(folder)
        weights, config = folder / "diffusion_pytorch_model.safetensors", folder / "config.json"
        weights.chmod(config.stat().st_mode)  # diffusers' is private to its owner, whatever the umask
        (folder / "README.md").write_text(readme(self))


def readme(trainer: Trainer) -> str:
    """Where the weights come from: command, hardware, steps, minutes, loss."""
    settings = trainer.settings
    command = f"OMP_NUM_THREADS={torch.get_num_threads()} python {' '.join(['tools/' + Path(sys.argv[0]).name, *sys.argv[1:]])}"
    megabytes = sum(p.numel() for p in trainer.average.parameters()) * 4 / 1e6
    return f"""# Quick-start teacher

A Wan2.1-architecture transformer ({megabytes:.1f} MB, fp32) that makes 16x16 videos of two moving digits. Trained from
random weights on scikit-learn's bundled digit images (`sklearn.datasets.load_digits`: 1,797 images of the UCI "Optical
Recognition of Handwritten Digits" test set, CC BY 4.0) by `tools/quickstart/train_teacher.py`; no other weights or data.

| | |
| --- | --- |
| command | `{command}` |
| hardware | {cpu_name()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, fp32 |
| steps | {trainer.step} of {settings.batch} videos ({trainer.step * settings.batch:,} videos) |
| minutes | {trainer.seconds / 60:.1f} of {settings.minutes:g} |
| flow-matching loss | {trainer.recent_loss:.4f} (mean of the last {LOG_STEPS} steps) |
| commit | {git_commit()} |

Weights are the exponential moving average (decay {settings.ema_decay}). Captions are encoded by
`rcm_megatron.models.encoders.WordTextEncoder()` with its defaults; "" is the unconditional caption.
"""


def cpu_name() -> str:
    """Model name of this machine's CPU, as Linux gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def git_commit() -> str:
    """Short hash of HEAD, or "none" outside a repository or before its first commit."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else "none"


def run(settings: Settings) -> None:
    """Train until the time budget is used, with a log line every `LOG_STEPS` steps."""
    settings.output.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(settings)
    if (settings.output / "state.pt").exists():
        trainer.load(settings.output / "state.pt")
        print(f"resumed at step {trainer.step}, {trainer.seconds / 60:.1f} minutes", flush=True)
    losses: list[float] = []
    last_save, before = trainer.seconds, time.monotonic()
    while trainer.seconds < 60.0 * settings.minutes:
        losses.append(trainer.train_step())
        now = time.monotonic()
        trainer.seconds, before = trainer.seconds + now - before, now
        if trainer.step % LOG_STEPS == 0:
            trainer.recent_loss = sum(losses) / len(losses)
            losses.clear()
            log_line(trainer)
        if trainer.seconds - last_save > 60.0 * settings.checkpoint_minutes:
            last_save = trainer.seconds
            trainer.save()
    trainer.save()


def log_line(trainer: Trainer) -> None:
    """Print progress, and append it to log.jsonl."""
    minutes = trainer.seconds / 60
    left = trainer.settings.minutes - minutes
    print(
        f"step {trainer.step:6d}  loss {trainer.recent_loss:.4f}  {minutes:5.1f} min, {left:5.1f} left  "
        f"{trainer.step * trainer.settings.batch / trainer.seconds:.0f} videos/s",
        flush=True,
    )
    with (trainer.settings.output / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": trainer.step, "loss": trainer.recent_loss, "minutes": minutes}) + "\n")


def parse_arguments() -> Settings:
    """Settings from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="skip torch.compile (about 25%% slower, no C++ compiler)")
    arguments = parser.parse_args()
    return Settings(
        output=arguments.output,
        minutes=arguments.minutes,
        seed=arguments.seed,
        compile=not arguments.eager,
    )


if __name__ == "__main__":
    run(parse_arguments())
