"""What network weights are of: their format and family from keys and shapes, its settings from a config.json or from the shapes."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from rcm_megatron.checkpoint.formats.base import Format
from rcm_megatron.config import ConfigError, ModelConfig, build
from rcm_megatron.errors import CheckpointError, nearest
from rcm_megatron.families.family import Family, Fields, Naming, Shapes
from rcm_megatron.registries import FAMILIES, FORMATS, family_of

FREE_FIELDS = ("text_len", "rope_max_seq_len")
"""Of every family, beside `Family.free_fields`: not visible in any tensor and without effect on a conversion, a run may have others."""


def recognise(shapes: Shapes) -> tuple[Format, Family]:
    """The format and family of weights. Raises CheckpointError for those of nobody."""
    for form in FORMATS.values():
        for family in FAMILIES.values():
            naming = form.naming(family)
            if naming is not None and naming.is_used_by(shapes):
                return form, family
    titles = " or ".join(family.title for family in FAMILIES.values())
    raise CheckpointError(
        f"not a {titles} network{_hint(shapes)}; keys look like {sorted(shapes)[:3]}; need the naming of one of {', '.join(FORMATS)}"
    )


def describing(config: Mapping[str, Any] | None, shapes: Shapes) -> Naming | None:
    """Whose way to read the config.json beside weights, which may lie there in another naming; None where nothing says what they are."""
    if config is None:
        return None
    own, family = recognise(shapes)
    namings = [naming for form in FORMATS.values() if (naming := form.naming(family)) is not None]
    naming = next((naming for naming in namings if naming.is_config(config)), own.naming(family))
    return naming if naming.read_config is not None else None


def read_model(config: Mapping[str, Any] | None, shapes: Shapes, overrides: Mapping[str, Any]) -> ModelConfig:
    """The network of weights with these shapes. Raises CheckpointError; `overrides` as in `CheckpointSource.model_config`."""
    form, family = recognise(shapes)
    try:
        return build(family.settings, _fields(config, shapes, form.naming(family), family, overrides))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def _fields(
    config: Mapping[str, Any] | None, shapes: Shapes, own: Naming, family: Family, overrides: Mapping[str, Any]
) -> Fields:
    known = [field.name for field in fields(family.settings)]
    for name in overrides:
        if name not in known:
            raise CheckpointError(f"unknown model field {name!r}{nearest(name, known)}")
    if (naming := describing(config, shapes)) is not None:
        found = naming.read_config(config, shapes)
        free = (*FREE_FIELDS, *family.free_fields)
        fixed = [n for n in overrides if n not in free and overrides[n] != found[n]]
        if fixed:
            raise CheckpointError(
                f"config.json says {fixed[0]}={found[fixed[0]]!r}; drop the override (--{fixed[0].replace('_', '-')})"
            )
        return {**found, **overrides}
    if own.read_shapes is None:
        raise CheckpointError("no config.json beside the weights; pass the folder that holds both")
    return own.read_shapes(shapes, overrides)


def check_same_network(found: ModelConfig, model: ModelConfig, *, where: str) -> None:
    """Raises CheckpointError where a file's configuration describes another network than `model` (a wrong head count fits every shape)."""
    if different := differences(found, model):
        listed = (f"{name}={got!r} (the run has {need!r})" for name, (got, need) in different.items())
        raise CheckpointError(f"{where} holds another network: {', '.join(listed)}; set the run's model to the file's")


def differences(found: ModelConfig, model: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Field -> (the file's, the model's) where they are two networks."""
    free = (*FREE_FIELDS, *family_of(model).free_fields)
    pairs = {field.name: (getattr(found, field.name, None), getattr(model, field.name)) for field in fields(model)}
    return {name: (got, need) for name, (got, need) in pairs.items() if name not in free and got != need}


def parameter_names() -> frozenset[str]:
    """What parameters are called in any format, a block's number written as `#`."""
    return _known(*_registered())[0]


def is_no_weight(name: str) -> bool:
    """Whether a key that some family's files hold is no part of a network: a counter, a constant, a library's state."""
    return name.endswith(_known(*_registered())[1])


def _registered() -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(FORMATS), tuple(FAMILIES)


@functools.cache
def _known(formats: tuple[str, ...], families: tuple[str, ...]) -> tuple[frozenset[str], tuple[str, ...]]:
    """Names of parameters, and ends of keys that are none, in all of these formats."""
    namings = [FORMATS[form].naming(FAMILIES[family]) for form in formats for family in families]
    namings = [naming for naming in namings if naming is not None]
    names = frozenset(name for naming in namings for name in naming.key_map.names())
    return names, tuple({end for naming in namings for end in naming.no_weights})


def _hint(names: Iterable[str]) -> str:
    if any(".lora_" in name or name.endswith((".diff", ".diff_b")) for name in names):
        return ", but a LoRA, which changes one: pass its network, and this file as --lora"
    return ""
