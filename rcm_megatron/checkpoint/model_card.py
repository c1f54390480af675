"""The README.md of a folder of weights: what it is, where it comes from, how it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rcm_megatron.config import ModelConfig, RunConfig, to_yaml
from rcm_megatron.registries import FORMATS, family_of

FEW_STEP_WEIGHTS = ("student", "ema")
"""The networks of a run that sample in a few steps."""
Companions = Callable[[RunConfig, str], tuple[str, Mapping[str, str]]]
"""(run, folder of its student, or of its two transformers) -> how to sample it, for the model card, and files that go beside weights."""


def folder_texts(
    model_config: ModelConfig,
    *,
    title: str,
    facts: Mapping[str, str],
    target_format: str,
    path: str,
    pipeline_folder: str,
    run: RunConfig | None,
    companions: Companions | None,
) -> dict[str, str]:
    """The model card, and what a run's student in diffusers' format needs beside its weights. Arguments as of `model_card`.

    ``pipeline_folder``: what the command was asked to write, which is `path`, or holds it and the second network of a pipeline."""
    usage, texts = "", {}
    is_student = run is not None and facts["weights"] in FEW_STEP_WEIGHTS
    if companions is not None and is_student and FORMATS[target_format].takes_companions:
        usage, texts = companions(run, pipeline_folder)
    about = {"title": title, "facts": facts, "target_format": target_format, "path": path}
    return {**texts, "README.md": model_card(model_config, **about, usage=usage, run=run)}


def model_card(
    model_config: ModelConfig,
    *,
    title: str,
    facts: Mapping[str, str],
    target_format: str,
    path: str,
    usage: str = "",
    run: RunConfig | None = None,
) -> str:
    """Markdown. `facts`: the table of provenance; `usage`: how to sample; `run`: the run that trained the weights."""
    table = "\n".join(f"| {name} | `{value}` |" for name, value in facts.items())
    load = FORMATS[target_format].how_to_load(model_config, path)
    size = f"{model_config.num_layers} layers, hidden size {model_config.hidden_size}, {model_config.num_heads} heads"
    parts = [
        f"# {title}",
        f"{family_of(model_config).title} diffusion transformer ({size}) in the format `{target_format}`, written by rcm_megatron.",
        "Predicts the rectified-flow velocity noise - x0." + (f" {usage}" if usage else ""),
        f"| | |\n| --- | --- |\n{table}",
        f"```python\n{load}\n```",
    ]
    if run is not None:
        parts.append(f"## Configuration of the run\n\n```yaml\n{to_yaml(run)}```")
    return "\n\n".join(parts) + "\n"
