"""diffusers' format: the folder that `from_pretrained` of the family's class loads, and that class' forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from rcm_megatron.checkpoint.formats.base import Format
from rcm_megatron.checkpoint.writers import SafetensorsFolder
from rcm_megatron.config import ModelConfig
from rcm_megatron.errors import CheckpointError
from rcm_megatron.inputs import WholeInput
from rcm_megatron.registries import family_of


class Diffusers(Format):
    takes_companions = True
    library = "diffusers"

    def how_to_load(self, model: ModelConfig, path: str) -> str:
        return f"{family_of(model).diffusers_class}.from_pretrained({path!r})"

    @torch.no_grad()
    def forward(self, model: ModelConfig, folder: Path, given: WholeInput, *, dtype: torch.dtype | None) -> Tensor:
        import diffusers

        family = family_of(model)
        network = getattr(diffusers, family.diffusers_class)
        network = network.from_pretrained(folder, torch_dtype=torch.float32).eval()
        for parameter in network.parameters():
            parameter.copy_(parameter.to(dtype or parameter.dtype))
        inputs = {"encoder_hidden_states": given.text_BLD, **family.diffusers_inputs(model, given)}
        with _own_padding_mask():
            (v_BCTHW,) = network(return_dict=False, **inputs)
        return v_BCTHW.double()


@contextmanager
def _own_padding_mask() -> Iterator[None]:
    """Where torchvision is not installed, diffusers cannot resize Cosmos' padding mask; one of the right size needs none."""
    from diffusers.models.transformers import transformer_cosmos

    if hasattr(transformer_cosmos, "transforms"):
        yield
        return

    def resize(mask: Tensor, size: list[int], *, interpolation: object) -> Tensor:
        if list(mask.shape[-2:]) != size:
            raise CheckpointError(
                f"got a padding mask of {list(mask.shape[-2:])}; need {size}, or torchvision to resize it"
            )
        return mask

    functional, modes = SimpleNamespace(resize=resize), SimpleNamespace(NEAREST=None)
    transformer_cosmos.transforms = SimpleNamespace(functional=functional, InterpolationMode=modes)
    try:
        yield
    finally:
        del transformer_cosmos.transforms


DIFFUSERS = Diffusers("diffusers", SafetensorsFolder("diffusion_pytorch_model"))
