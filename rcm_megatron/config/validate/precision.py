"""FP8 against the networks' sizes and the layout."""

from __future__ import annotations

from collections.abc import Iterator

from rcm_megatron.config.declare import Change, Problem
from rcm_megatron.config.model import FP8_ALIGNMENT
from rcm_megatron.config.run import RunConfig


def _fp8_networks(config: RunConfig) -> Iterator[Problem | str]:
    fp8 = config.precision.fp8
    for name, present in (("teacher", config.needs_teacher), ("fake_score", config.needs_fake_score)):
        if name in fp8 and not present:
            yield f"precision.fp8={list(fp8)} names the {name}, which no stage of this run uses; take it out"


def _fp8_shapes(config: RunConfig) -> Iterator[Problem | str]:
    """Rows and columns of every FP8 matrix; a rank's video tokens are padded to fit (RunConfig.token_multiple)."""
    if not config.precision.fp8:
        return
    model, tp, fp8 = config.model, config.parallel.tp, f"precision.fp8={list(config.precision.fp8)}"
    for name in ("hidden_size", "ffn_hidden_size"):
        size = getattr(model, name)
        if size % (FP8_ALIGNMENT * tp):
            yield Problem(
                f"model.{name}={size} must divide by {FP8_ALIGNMENT}*parallel.tp = {FP8_ALIGNMENT * tp} for {fp8}",
                (Change("parallel.tp", range(tp - 1, 0, -1)), Change("precision.fp8", ((),))),
            )
    if model.text_len % FP8_ALIGNMENT:
        yield (
            f"model.text_len={model.text_len} must divide by {FP8_ALIGNMENT} for {fp8}, because the network attends to every text "
            "position and none can be added; set fp8 to []"
        )
    if model.wan is not None and model.wan.image_dim is not None:
        yield f"{fp8} multiplies rows in multiples of {FP8_ALIGNMENT}, which the 257 CLIP tokens of image_dim are not; set fp8 to []"


PRECISION_RULES = (_fp8_networks, _fp8_shapes)
