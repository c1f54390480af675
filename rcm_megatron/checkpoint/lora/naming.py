"""What a naming of LoRA files is: whose names its modules have, and what the programs that read it take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rcm_megatron.config import ModelConfig
from rcm_megatron.errors import CheckpointError
from rcm_megatron.families.key_map import Entry
from rcm_megatron.registries import FORMATS, LORA_NAMINGS, family_of


@dataclass(frozen=True, kw_only=True)
class LoraNaming:
    """One naming. Every one is read; the fields beside the names say what is written, which is what its readers take."""

    name: str
    format: str
    """Of checkpoints, whose names the modules have."""
    prefix: str
    """What every key begins with."""
    separator: str = "."
    """Between the parts of a module's name."""
    down: str
    up: str
    """Ends of the keys of A, ``[r, in]``, and B, ``[out, r]``."""
    writes_alpha: bool = False
    """A key ``.alpha`` for each module: its rank, for B holds the scale."""
    one_rank: bool = False
    """Its readers scale layers of another rank wrongly: shorter ones are padded with zeros."""
    takes_differences: bool = False
    """Its readers add ``.diff`` to a weight and ``.diff_b`` to a bias."""
    outside_blocks: bool = True
    """Its readers take modules outside of the blocks."""
    conv_patch: bool = False
    """Its readers take the patch embedding."""
    reader: str
    """Which programs read it."""

    def key(self, module: str) -> str:
        """What the keys of a module of the format begin with."""
        return self.prefix + module.replace(".", self.separator)

    def spelling(self, module: str) -> str:
        """What a file's keys call a module behind whatever wraps them: with a separator of its own the prefix is one word with it."""
        return module if self.separator == "." else self.key(module)

    def knows(self, model: ModelConfig) -> bool:
        """Whether the format has names for the family."""
        return FORMATS[self.format].naming(family_of(model)) is not None

    def entries(self, model: ModelConfig) -> dict[str, Entry]:
        """Internal name -> the tensors of the format. Raises CheckpointError for a family that it does not know."""
        return FORMATS[self.format].naming_of(model).key_map.entries(model)

    def holds(self, internal: str, entry: Entry) -> bool:
        """Whether it takes a low-rank change of an internal parameter."""
        if not internal.endswith(".weight") or len(entry.internal_shape) != 2:
            return False
        if len(entry.external_shape) > 2:
            return self.conv_patch
        return internal.startswith("blocks.") or self.outside_blocks


def namings_of(model: ModelConfig) -> Iterator[LoraNaming]:
    """All that know the family of a network."""
    return (naming for naming in LORA_NAMINGS.values() if naming.knows(model))


def naming_to_write(name: str, model: ModelConfig) -> LoraNaming:
    """A naming by name. Raises CheckpointError where it has no names for the family."""
    naming = LORA_NAMINGS[name]
    if not naming.knows(model):
        known = ", ".join(other.name for other in namings_of(model))
        raise CheckpointError(f"no LoRA naming {name!r} of a {family_of(model).title} network; need one of {known}")
    return naming


DIFFUSERS = LoraNaming(
    name="diffusers",
    format="diffusers",
    prefix="transformer.",
    down=".lora_A.weight",
    up=".lora_B.weight",
    one_rank=True,
    conv_patch=True,
    reader="diffusers' load_lora_weights",
)
NATIVE = LoraNaming(
    name="native",
    format="wan",
    prefix="diffusion_model.",
    down=".lora_down.weight",
    up=".lora_up.weight",
    writes_alpha=True,
    takes_differences=True,
    # diffusers' loader refuses an alpha outside of the blocks
    outside_blocks=False,
    reader="ComfyUI, LightX2V, diffusers",
)
MUSUBI = LoraNaming(
    name="musubi",
    format="wan",
    prefix="lora_unet_",
    separator="_",
    down=".lora_down.weight",
    up=".lora_up.weight",
    writes_alpha=True,
    outside_blocks=False,
    reader="musubi-tuner, ComfyUI",
)
