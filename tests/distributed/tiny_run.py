"""A run of 20 steps in seconds: its data, teacher and configuration, the training as a function of a rank, what it left behind.

Stages: 5 steps of sCM (3 of them warm-up), then 15 of sCM with DMD, every second one for the fake score. AdamW's eps is 1e-4, so that
rounding in a gradient near zero does not become a full step.
"""

import contextlib
import io
import json
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
import yaml

from rcm_megatron.config import build, load_config
from rcm_megatron.families.wan.settings import WanModelConfig

STEPS = 20
GLOBAL_BATCH = 4
MODEL = {
    "family": "wan",
    "num_layers": 2,
    "hidden_size": 48,
    "num_heads": 4,
    "ffn_hidden_size": 72,
    "in_channels": 1,
    "out_channels": 1,
    "patch_size": [1, 4, 4],
    "text_dim": 32,
    "text_len": 6,
    "freq_dim": 32,
}
ADAM = {"lr": 1e-3, "betas": [0.0, 0.999], "eps": 1e-4, "weight_decay": 0.01, "lr_warmup_steps": 4}


def write_tiny_run(folder, *, sizes=None, **changes):
    """Dataset, random teacher (diffusers format) and run.yaml in `folder`; returns its path.

    `changes`: other fields of MODEL. `sizes`: {role: what of `model` differs}; then each network has random weights of its own."""
    from rcm_megatron.checkpoint.models import write_checkpoint
    from rcm_megatron.networks.weights import seeded_weights
    from tools.quickstart.build_dataset import write_digits_dataset

    folder, model = Path(folder), model_config(**changes)
    write_digits_dataset(folder / "data", num_samples=13, samples_per_shard=5, seed=0)
    config = tiny_config(folder, **changes)
    for seed, role in enumerate(config["networks"] if sizes else ("teacher",), start=5):
        own = replace(model, **sizes.get(role, {})) if sizes else model
        write_checkpoint(seeded_weights(own, seed=seed).items(), own, folder / role)
        if sizes:
            config["networks"][role] |= {"init": str(folder / role), "model": sizes.get(role)}
    (folder / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return folder / "run.yaml"


def model_config(**changes):
    return build(WanModelConfig, MODEL | changes)


def tiny_config(folder, **changes):
    return {
        "name": "tiny",
        "seed": 3,
        "output_dir": str(folder / "out"),
        "model": MODEL | changes,
        "latent": {"channels": 1, "frames": 4, "height": 16, "width": 16},
        "precision": {"params_dtype": "fp32"},
        "networks": {
            "teacher": {"init": str(folder / "teacher")},
            "student": {"optimizer": ADAM, "ema": {}},
            "fake_score": {"optimizer": ADAM},
        },
        "distillation": {
            "teacher_guidance": 2.0,
            "p_g": {"kind": "lognormal", "mean": 0.7, "std": 1.6},
            "p_d": {"kind": "uniform_shift", "shift": 5.0},
            "max_rollout_steps": 3,
        },
        "stages": [
            {"name": "scm", "steps": 5, "losses": {"scm": 100.0}, "tangent_warmup": 3},
            {"name": "rcm", "steps": 15, "losses": {"scm": 100.0, "dmd": 1.0}, "student_update_freq": 2},
        ],
        "encoders": {"video": "pixels", "text": "words"},
        "data": {"folder": str(folder / "data"), "num_threads": 1},
        "trainer": {"global_batch_size": GLOBAL_BATCH, "micro_batch_size": 2, "checkpoint_every": 10},
        "logging": {"wandb_mode": "disabled", "progress_bar": False},
    }


def train(config_path, overrides, fault=None):
    """Train on this rank as `python -m rcm_megatron train` does; returns (counters, {network: whole weights}, what `fault` noted).

    `fault` names a function of tests.distributed.faults, called with the trainer before it starts.
    """
    from rcm_megatron.platform.megatron import prepare_megatron

    prepare_megatron()
    from rcm_megatron.parallel.groups import initialize_parallel
    from rcm_megatron.training.trainer import Trainer
    from tests.distributed import faults

    run = load_config(config_path, overrides)
    trainer = Trainer(run, initialize_parallel(run.parallel))
    noted = {} if fault is None else getattr(faults, fault)(trainer)
    trainer.train()
    trainer.close()
    updates = {f"updates/{role}": network.counters.updates for role, network in trainer.state.trained.items()}
    counters = asdict(trainer.progress) | updates | {"refused_updates": trainer.state.refused_updates}
    return counters, whole_weights(trainer), noted


def command(argv):
    """`python -m rcm_megatron …` on this rank: (exit status, stderr)."""
    from rcm_megatron.cli.main import main

    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        try:
            status = main(argv)
        except SystemExit as end:  # Python prints a message to stderr and exits with 1
            status = end.code if isinstance(end.code, int) else 1
            stderr.write("" if isinstance(end.code, int) else str(end.code))
    return status, stderr.getvalue()


def whole_weights(trainer):
    """{network: {parameter: whole tensor}} on tensor-parallel rank 0, None for the parameters elsewhere."""
    from rcm_megatron.checkpoint.models import gather_full

    weights = {}
    for name in trainer.state.trained:
        groups = trainer.groups
        chunks = trainer.state.networks[name]
        with ExitStack() as stack:
            for chunk in chunks:
                stack.enter_context(chunk.gathered() if hasattr(chunk, "gathered") else nullcontext())
            gathered = gather_full(chunks, tp_group=groups.tp, pp_group=groups.pp)
            weights[name] = {key: None if value is None else value.clone() for key, value in gathered}
    return weights


MEASURED = (
    "seconds/",
    "samples_per_second",
    "tokens_per_second",
    "tflops_per_device",
    "mfu",
    "peak_memory_gib",
    "restarts",
)
"""Of a record, what depends on the machine."""


def records(folder):
    """The metrics of a run, one dict an iteration, without what depends on the machine."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(MEASURED)} for line in lines]


def initial_weights(**changes):
    """What student and fake score start from."""
    from rcm_megatron.networks.weights import seeded_weights

    return dict(seeded_weights(model_config(**changes), seed=5))


def flat_change(weights, initial):
    """All parameters' change since the start, as one vector."""
    return torch.cat([(weights[name] - initial[name]).flatten().double() for name in sorted(initial)])
