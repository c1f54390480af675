"""Embeddings of many prompts, encoded by all ranks before the networks take their memory, and read as they are needed.

Shapes: L text positions, B batch, D text width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from rcm_megatron.config import RunConfig
from rcm_megatron.data.samples import load_caption_embedding
from rcm_megatron.errors import InputError
from rcm_megatron.files import write_atomically
from rcm_megatron.finite import require_finite
from rcm_megatron.models.encoders import build_text_encoder
from rcm_megatron.platform.device import this_device


@dataclass(frozen=True, kw_only=True)
class TextFolder:
    """One file a prompt; None is the run's negative prompt."""

    run: RunConfig
    folder: Path

    def encode(self, prompts: Sequence[str | None]) -> None:
        """Encode what is not there yet. Call on all ranks, each of which loads the encoder for its share; InputError on all of them."""
        missing = [
            prompt for prompt in prompts[dist.get_rank() :: dist.get_world_size()] if not self._path(prompt).is_file()
        ]
        failure = ""
        try:
            self._encode(missing)
        except ValueError as error:
            failure = str(error)
        everywhere = [""] * dist.get_world_size()
        dist.all_gather_object(everywhere, failure)
        if message := next(filter(None, everywhere), None):
            raise InputError(message)

    def load(self, prompts: Sequence[str | None]) -> Tensor:
        """[L, B, D], float32 on the CPU."""
        shape = {"text_len": self.run.model.text_len, "text_dim": self.run.model.text_dim}
        return torch.stack([load_caption_embedding(self._path(prompt), **shape) for prompt in prompts], dim=1)

    def _encode(self, prompts: Sequence[str | None]) -> None:
        if not prompts:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        run, shape = self.run, {"text_len": self.run.model.text_len, "text_dim": self.run.model.text_dim}
        own = run.data.negative_embedding
        with closing(build_text_encoder(run.encoders, **shape, device=this_device())) as encoder:
            for prompt in tqdm(prompts, "prompts", unit="prompt", disable=dist.get_rank() > 0 or None, leave=False):
                if prompt is None and own is not None:
                    embed_LD = load_caption_embedding(own, **shape)
                else:
                    embed_LD = encoder.encode([encoder.negative_prompt if prompt is None else prompt])[0]
                require_finite(embed_LD, what=f"{prompt or 'the negative prompt'!r:.80}: embedding")
                write_atomically(self._path(prompt), save({"embed": _trimmed(embed_LD)}))

    def _path(self, prompt: str | None) -> Path:
        name = "negative" if prompt is None else hashlib.sha256(prompt.encode()).hexdigest()[:40]
        return self.folder / f"{name}.safetensors"


def _trimmed(embed_LD: Tensor) -> Tensor:
    """Up to the last position that is not zero."""
    used = embed_LD.ne(0).any(dim=-1).nonzero()
    return embed_LD[: int(used[-1]) + 1 if len(used) else 1].float().cpu().contiguous()
