"""A diffusers checkpoint of Wan's encoders in miniature: the real classes with random weights, and a tokenizer of some words."""

import json
from pathlib import Path

import torch

WORDS = [
    "a",
    "cat",
    "and",
    "dog",
    "baking",
    "cake",
    "together",
    "in",
    "the",
    "kitchen",
    ",",
    ".",
    "&",
    "'",
    "café",
    "静态",
    "字幕",
]
SPECIAL = ("<pad>", "</s>", "<s>", "<unk>")
"""In UMT5's order, where the unknown piece is not T5's number 2."""


def write_encoders(folder, *, text_dim=16, vae=None):
    """`vae/`, `text_encoder/` and `tokenizer/` in `folder`; `vae`: fields of AutoencoderKLWan's configuration."""
    write_vae(Path(folder) / "vae", **(vae or {}))
    write_text_encoder(Path(folder) / "text_encoder", text_dim=text_dim)
    write_tokenizer(Path(folder) / "tokenizer")
    return Path(folder)


def write_vae(folder, **fields):
    """Random AutoencoderKLWan; Wan2.1's latents of 16 channels unless `fields` say otherwise."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(1)
    AutoencoderKLWan(**({"base_dim": 4, "num_res_blocks": 1} | fields)).save_pretrained(folder)


WAN22_VAE = {
    "z_dim": 48,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
    "latents_mean": [0.01 * channel for channel in range(48)],
    "latents_std": [0.5 + 0.02 * channel for channel in range(48)],
}


def write_text_encoder(folder, *, text_dim=16, kind="UMT5"):
    """Random UMT5EncoderModel or T5EncoderModel in several shards."""
    import transformers

    config_class, model_class = (getattr(transformers, f"{kind}{part}") for part in ("Config", "EncoderModel"))
    torch.manual_seed(2)
    fields = {"vocab_size": 64, "d_model": text_dim, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    model = model_class(config_class(**fields, relative_attention_num_buckets=8))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder, max_shard_size="4KB")


def write_tokenizer(folder):
    """A Unigram tokenizer made as UMT5's is; letters are pieces, so most words of Latin script can be said."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    pieces = [*(f"▁{word}" for word in WORDS), *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = [*((piece, 0.0) for piece in SPECIAL), ("▁", -2.0)]
    vocabulary += [(piece, -3.0 - 0.1 * rank) for rank, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=SPECIAL.index("<unk>"), byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(list(SPECIAL))
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "extra_ids": 0}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", **names}))


def write_image_encoder(folder, *, image_dim=24):
    """Random CLIPVisionModel in `image_encoder/`, with 257 tokens as ViT-H/14 has them, and its `image_processor/`."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(3)
    fields = {"hidden_size": image_dim, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = CLIPVisionModel(CLIPVisionConfig(**fields, image_size=32, patch_size=2))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(Path(folder) / "image_encoder")
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessorPil(**sizes).save_pretrained(Path(folder) / "image_processor")
