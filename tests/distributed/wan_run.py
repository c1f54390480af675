"""A tiny Wan with its encoders: random teacher, VAE and text encoder in diffusers' folders, random latents, run.yaml."""

import torch
import yaml

from rcm_megatron.config import load_config
from tests.distributed.tiny_run import tiny_config
from tests.wan_encoders import write_encoders

TEXT_DIM, TEXT_LEN = 16, 12
LATENT = {"channels": 16, "frames": 2, "height": 4, "width": 6}


def write_wan_run(folder):
    """run.yaml of such a run, with its data, in `folder`."""
    from rcm_megatron.checkpoint.convert import export_diffusers
    from rcm_megatron.training.networks import seeded_weights

    write_encoders(folder / "wan", text_dim=TEXT_DIM)
    config = tiny_config(folder)
    shape = {"in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2], "text_dim": TEXT_DIM, "text_len": TEXT_LEN}
    config |= {"model": config["model"] | shape, "latent": LATENT}
    config["encoders"] = {"video": "wan_vae", "text": "umt5", "folder": str(folder / "wan")}
    config["sampling"] = {"num_samples": 1, "student_steps": [2], "teacher_steps": 2}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    model = load_config(folder / "run.yaml").model
    export_diffusers(seeded_weights(model, seed=5).items(), model, folder / "teacher")
    write_latents(folder / "data")
    return folder / "run.yaml"


def write_latents(folder):
    """A shard of random latents and embeddings."""
    from rcm_megatron.data.shards import ShardWriter

    generator = torch.Generator().manual_seed(0)
    with ShardWriter(folder, samples_per_shard=8, member_format="pt") as writer:
        for index in range(8):
            latent_CTHW = torch.randn(tuple(LATENT.values()), generator=generator)
            embed_LD = torch.randn(5, TEXT_DIM, generator=generator)
            writer.add(f"{index:04d}", latent_CTHW=latent_CTHW, embed_LD=embed_LD, prompt=f"number {index}")
