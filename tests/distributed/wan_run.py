"""A tiny Wan with its encoders: random teacher, VAE and text encoder in diffusers' folders, random latents, run.yaml."""

import torch
import yaml

from rcm_megatron.config import load_config
from tests.distributed.tiny_run import tiny_config
from tests.wan_encoders import write_encoders, write_image_encoder

TEXT_DIM, TEXT_LEN, IMAGE_DIM = 16, 12, 24
CLIP_TEXT_LEN = 512
"""With CLIP tokens: diffusers takes what comes before the last 512 for the image's."""
LATENT = {"channels": 16, "frames": 2, "height": 4, "width": 6}
KINDS = {
    "t2v": {},
    "i2v": {"condition_channels": 20, "image_dim": IMAGE_DIM},
    "i2v_2.2": {"condition_channels": 20},
    "ti2v": {"conditional_frames": True},
}
"""What `model` says of images: nothing, an image beside the latent with and without CLIP's features, or in the first frame's place."""


def write_wan_run(folder, kind="t2v"):
    """run.yaml of such a run, with its data, in `folder`."""
    from rcm_megatron.checkpoint.models import write_checkpoint
    from rcm_megatron.networks.weights import seeded_weights

    write_encoders(folder / "wan", text_dim=TEXT_DIM)
    config = tiny_config(folder)
    shape = {"in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2], "text_dim": TEXT_DIM}
    shape["text_len"] = CLIP_TEXT_LEN if kind == "i2v" else TEXT_LEN
    config |= {"model": config["model"] | shape | KINDS[kind], "latent": LATENT}
    config["encoders"] = {"video": "wan_vae", "text": "umt5", "folder": str(folder / "wan")}
    if kind == "i2v":
        write_image_encoder(folder / "wan", image_dim=IMAGE_DIM)
        config["encoders"] |= {"image": "clip"}
    if kind == "ti2v":
        config["distillation"] |= {"conditional_frames": [0, 1]}
    config["sampling"] = {"num_samples": 1, "student_steps": [2], "teacher_steps": 2}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    model = load_config(folder / "run.yaml").model
    write_checkpoint(seeded_weights(model, seed=5).items(), model, folder / "teacher")
    write_latents(folder / "data", kind)
    return folder / "run.yaml"


def write_latents(folder, kind):
    """A shard of random latents and embeddings, and of images where the network is given them."""
    from rcm_megatron.data.shards import ShardWriter

    generator = torch.Generator().manual_seed(0)
    with ShardWriter(folder, samples_per_shard=8, member_format="pt") as writer:
        for index in range(8):
            latent_CTHW = torch.randn(tuple(LATENT.values()), generator=generator)
            rows = CLIP_TEXT_LEN if kind == "i2v" else 5  # among 512, five would be too few for guidance to matter
            embed_LD = torch.randn(rows, TEXT_DIM, generator=generator)
            image = {}
            if kind.startswith("i2v"):
                image["image_latent_CTHW"] = torch.randn(latent_CTHW.shape, generator=generator)
            if kind == "i2v":
                image["image_embed_LD"] = torch.randn(257, IMAGE_DIM, generator=generator)
            known = {"latent_CTHW": latent_CTHW, "embed_LD": embed_LD, "prompt": f"number {index}"}
            writer.add(f"{index:04d}", **known, **image)
