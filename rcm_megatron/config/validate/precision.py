"""FP8 against the networks' sizes, the objectives and the layout."""

from __future__ import annotations

from collections.abc import Iterator

from rcm_megatron.config.declare import Change, Problem
from rcm_megatron.config.model import FP8_ALIGNMENT
from rcm_megatron.config.run import RunConfig


def _fp8_roles(config: RunConfig) -> Iterator[str]:
    return (role for role, network in config.networks.items() if network.fp8)


def _fp8(config: RunConfig) -> Iterator[Problem | str]:
    precision = config.precision
    for role in _fp8_roles(config):
        path = f"networks.{role}.fp8"
        off = (Change(path, (False,)),)
        if role not in config.roles:
            yield Problem(f"{path}=true, but no stage of this run uses this network", off)
        if role in config.tangent_roles:
            yield Problem(
                f"{path}=true, but a stage takes a tangent through this network, of which FP8 leaves nothing", off
            )
        if role in config.trained_roles and config.networks[role].is_in_pieces:
            yield Problem(
                f"{path}=true keeps what it made of the weights from pass to pass, but networks.{role}.weights=sharded has them gathered "
                "anew in each",
                (Change(f"networks.{role}.weights", ("resident",)), *off),
            )
        if precision.linear_layers == "local":
            yield Problem(
                f"{path}=true needs Transformer Engine's linears, got precision.linear_layers=local",
                (Change("precision.linear_layers", ("auto",)), *off),
            )
        if precision.params_dtype != "bf16":
            yield Problem(
                f"{path}=true needs precision.params_dtype=bf16, got {precision.params_dtype}",
                (Change("precision.params_dtype", ("bf16",)), *off),
            )


def _fp8_shapes(config: RunConfig) -> Iterator[Problem | str]:
    """Rows and columns of every FP8 matrix; a rank's video tokens are padded to fit (RunConfig.token_multiple)."""
    tp = config.parallel.tp
    for role in _fp8_roles(config):
        fp8, model, path = f"networks.{role}.fp8", config.model_of(role), config.model_path(role)
        off = Change(fp8, (False,))
        for name in ("hidden_size", "ffn_hidden_size"):
            size = getattr(model, name)
            if size % (FP8_ALIGNMENT * tp):
                yield Problem(
                    f"{path}.{name}={size} must divide by {FP8_ALIGNMENT}*parallel.tp = {FP8_ALIGNMENT * tp} for {fp8}=true",
                    (Change("parallel.tp", range(tp - 1, 0, -1)), off),
                )
        if model.text_len % FP8_ALIGNMENT:
            yield Problem(
                f"{path}.text_len={model.text_len} must divide by {FP8_ALIGNMENT} for {fp8}=true, because the network attends to every "
                "text position and none can be added",
                (off,),
            )
        if model.image.dim is not None:
            yield Problem(
                f"{fp8}=true multiplies rows in multiples of {FP8_ALIGNMENT}, which the 257 CLIP tokens of image_dim are not",
                (off,),
            )


PRECISION_RULES = (_fp8, _fp8_shapes)
