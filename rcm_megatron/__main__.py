"""`python -m rcm_megatron COMMAND`. Commands import what they need when they run, so that --help answers at once."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rcm_megatron.config import ConfigError, RunConfig, load_config, to_yaml

_ABSENT = object()
CONVERT_FORMATS = ("diffusers", "wan", "nvlabs", "nvidia", "internal", "torch_dist")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; bad input is one message on stderr: exit status 2 for a configuration, 1 for files."""
    arguments = _parse(argv)
    try:
        arguments.run(arguments)
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"{arguments.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may also stand after options, where argparse would not expect more positionals."""
    parser = _parser()
    arguments, extra = parser.parse_known_args(argv)
    late = [item for item in extra if "=" in item and not item.startswith("-")]
    if len(late) < len(extra) or (late and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    if late:
        arguments.overrides += late
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rcm_megatron",
        description="Distil video diffusion transformers into 1-4 step generators with rCM on Megatron-Core.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    _add_sample(commands)
    _add_export(commands)
    _add_check(commands)
    _add_preflight(commands)
    _add_convert(commands)
    return parser


def _command(commands: argparse._SubParsersAction, name: str, run, summary: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary)
    parser.set_defaults(run=run, prog=parser.prog)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML run configuration, e.g. model_configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. parallel.tp=2 stages.0.steps=100")


def _load(arguments: argparse.Namespace, world_size: int) -> RunConfig:
    return load_config(arguments.config, arguments.overrides, world_size=world_size)


def _add_train(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "train", _train, "Run all stages of a configuration; start it with torchrun or srun.")
    _add_config(parser)


def _train(arguments: argparse.Namespace) -> None:
    config = _load(arguments, int(os.environ.get("WORLD_SIZE", "1")))
    from rcm_megatron.checkpoint.errors import CheckpointError
    from rcm_megatron.data.manifest import DatasetError
    from rcm_megatron.data.samples import SampleError
    from rcm_megatron.errors import InputError
    from rcm_megatron.models.encoders import EncoderError
    from rcm_megatron.runtime.stopping import PREEMPTED, Preempted
    from rcm_megatron.training import trainer

    try:
        trainer.main(config)
    except Preempted as stopped:
        print(f"{arguments.prog}: rank {os.environ.get('RANK', '0')}: {stopped}", file=sys.stderr, flush=True)
        raise SystemExit(PREEMPTED) from None
    except (CheckpointError, DatasetError, EncoderError, InputError, SampleError) as error:
        # may strike one rank only: each says which it is
        raise SystemExit(f"{arguments.prog}: rank {os.environ.get('RANK', '0')}: {error}") from None


def _load_for_inference(arguments: argparse.Namespace) -> RunConfig:
    """The run's configuration; one process needs no parallel layout, for checkpoints load on any."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    alone = ["parallel={}"] if world_size == 1 else []
    return load_config(arguments.config, [*arguments.overrides, *alone], world_size=world_size)


def _add_weights(parser: argparse.ArgumentParser) -> None:
    named = "a role of the run's networks, ROLE.ema for its average, or ema for the student's; default: ema"
    parser.add_argument("--weights", default="ema", metavar="ROLE", help=named)
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint or a folder of them; default: the run's latest")


def _add_sample(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "sample", _sample, "Sample videos; one process, or torchrun on any layout.")
    _add_config(parser)
    _add_weights(parser)
    parser.add_argument(
        "--steps", type=int, help="default: the most of sampling.student_steps, or sampling.teacher_steps"
    )
    parser.add_argument("--prompt", action="append", default=[], help="a caption; may be given several times")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help=".txt with a caption a line, or .jsonl")
    parser.add_argument(
        "--embedding", action="append", default=[], type=Path, metavar="FILE", help="an encoded caption [L, D]"
    )
    parser.add_argument("--image", type=Path, metavar="FILE", help="PNG, JPEG or WebP that videos begin with")
    parser.add_argument(
        "--image-latent", type=Path, metavar="FILE", help="in place of --image: its latent [C, T, H, W]"
    )
    parser.add_argument("--image-embed", type=Path, metavar="FILE", help="beside --image-latent: CLIP features [L, D]")
    parser.add_argument("--given", type=Path, metavar="FILE", help="Video2World, TI2V: latent [C, T, H, W] to continue")
    parser.add_argument("--conditional-frames", type=int, default=1, help="how many of its latent frames; default: 1")
    parser.add_argument("--copies", type=int, default=1, help="videos of each caption; default: 1")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for MP4s and latents")


def _sample(arguments: argparse.Namespace) -> None:
    config = _load_for_inference(arguments)
    from rcm_megatron.data.captions import read_prompts
    from rcm_megatron.inference.conditioning import ConditioningFiles
    from rcm_megatron.inference.sample import SampleRequest, sample

    with _named_errors(arguments):
        from_file = read_prompts(arguments.prompts) if arguments.prompts else []
    request = SampleRequest(
        weights=arguments.weights,
        output=arguments.output,
        steps=arguments.steps,
        checkpoint=arguments.checkpoint,
        prompts=[*arguments.prompt, *from_file],
        embeddings=arguments.embedding,
        copies=arguments.copies,
        **{field.name: getattr(arguments, field.name) for field in dataclasses.fields(ConditioningFiles)},
    )
    with _named_errors(arguments):
        sample(config, request)


def _add_export(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "export", _export, "Write a trained network as a diffusers folder.")
    _add_config(parser)
    _add_weights(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="default: fp32")
    parser.add_argument("--force", action="store_true", help="replace the folder")
    parser.add_argument("--verify", action="store_true", help="load it with diffusers and compare the two networks")


def _export(arguments: argparse.Namespace) -> None:
    config = _load_for_inference(arguments)
    from rcm_megatron.inference.export import ExportRequest, export

    fields = ("weights", "output", "checkpoint", "dtype", "force", "verify")
    with _named_errors(arguments):
        export(config, ExportRequest(**{name: getattr(arguments, name) for name in fields}))


@contextlib.contextmanager
def _named_errors(arguments: argparse.Namespace) -> Iterator[None]:
    """Bad input as one line instead of a traceback."""
    from rcm_megatron.checkpoint.errors import CheckpointError
    from rcm_megatron.errors import InputError
    from rcm_megatron.models.encoders import EncoderError

    try:
        yield
    except (CheckpointError, EncoderError, InputError) as error:
        raise SystemExit(f"{arguments.prog}: rank {os.environ.get('RANK', '0')}: {error}") from None


def _add_check(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "check", _check, "Print a configuration, complete, or every reason why it cannot run.")
    _add_config(parser)
    parser.add_argument("--world-size", type=int, required=True, metavar="N", help="processes it is to run on")
    parser.add_argument("--field", metavar="KEY", help="print the value of this field alone, e.g. output_dir")


def _check(arguments: argparse.Namespace) -> None:
    if arguments.world_size < 1:
        raise ConfigError(f"--world-size {arguments.world_size} must be at least 1")
    config = _load(arguments, arguments.world_size)
    if arguments.field is not None:
        print(_field(config, arguments.field))
        return
    print(f"# {config.layout_summary(arguments.world_size)}")
    print(to_yaml(config), end="")


def _field(config: RunConfig, key: str) -> object:
    value: object = config
    for part in key.split("."):
        value = value.get(part, _ABSENT) if isinstance(value, Mapping) else getattr(value, part, _ABSENT)
        if value is _ABSENT:
            raise ConfigError(f"--field {key}: the configuration has no such field")
    return value


def _add_preflight(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands, "preflight", _preflight, "Look at every node before a run and name the bad ones; one process a rank."
    )
    _add_config(parser)
    parser.add_argument("--timeout", type=float, default=50.0, metavar="S", help="seconds for all of it; default: 50")
    parser.add_argument("--nodes", default="", metavar="A,B", help="the job's nodes in the order of ranks")


def _preflight(arguments: argparse.Namespace) -> None:
    config = _load(arguments, int(os.environ.get("WORLD_SIZE", "1")))
    from rcm_megatron.cluster.preflight import preflight

    listed = [name for name in arguments.nodes.split(",") if name]
    status = preflight(config, timeout=arguments.timeout, listed=listed)
    sys.stdout.flush(), sys.stderr.flush()
    # a rank that takes its Gloo threads down after others have left may abort, and would look like a bad node
    os._exit(status)


def _add_convert(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "convert", _convert, "Convert a checkpoint; the source's format is recognised.")
    parser.add_argument(
        "source", help="folder or file: diffusers, the Wan release, NVlabs rCM, NVIDIA Cosmos, internal, or a run"
    )
    parser.add_argument("target", help="what to write: a folder, or a .pt/.safetensors file for nvlabs and nvidia")
    parser.add_argument("--to", required=True, choices=CONVERT_FORMATS, help="format of the target")
    parser.add_argument(
        "--weights",
        metavar="ROLE",
        help="of several networks: student, fake_score, or ema, ROLE.ema for averages",
    )
    parser.add_argument("--subfolder", help="which of two experts: transformer_2, or low_noise_model")
    parser.add_argument("--prefix", help="read only the keys that begin with it, e.g. model.diffusion_model.")
    parser.add_argument("--config", type=Path, metavar="YAML", help="of the run, if not where it was written")
    parser.add_argument("--dtype", help="fp32, bf16 or fp16; default: every tensor's own")
    parser.add_argument("--max-shard-size", type=_bytes, default="5GB", metavar="SIZE", help="e.g. 500MB; default: 5GB")
    parser.add_argument("--num-heads", type=int, help="where the source does not say")
    parser.add_argument("--text-len", type=int, help="where the source does not say")
    parser.add_argument("--eps", type=float, help="where the source does not say; default: 1e-6")
    parser.add_argument(
        "--patch-size", type=int, nargs=3, metavar=("T", "H", "W"), help="where the source does not say; default: 1 2 2"
    )
    parser.add_argument(
        "--rope-scale", type=float, nargs=3, metavar=("T", "H", "W"), help="where the source does not say"
    )
    parser.add_argument("--force", action="store_true", help="replace the target")
    parser.add_argument(
        "--verify", action="store_true", help="run source and target and compare them before it appears"
    )


def _bytes(text: str) -> int:
    """`5GB`, `500MB`, `20kB` or a plain number of bytes; units of 1000, as in Hugging Face's max_shard_size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B?", text, flags=re.IGNORECASE)
    size = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; need a size such as 5GB, 500MB or a number of bytes")
    return size


def _convert(arguments: argparse.Namespace) -> None:
    from rcm_megatron.checkpoint.convert import convert
    from rcm_megatron.checkpoint.errors import CheckpointError

    def companions(run: RunConfig, folder: str) -> tuple[str, dict[str, str]]:
        from rcm_megatron.inference.pipelines import student_companions  # Megatron, for a run's student only

        return student_companions(run, folder)

    fields = {name: getattr(arguments, name) for name in ("num_heads", "text_len", "eps", "patch_size", "rope_scale")}
    verify = None
    if arguments.verify:
        from rcm_megatron.inference.verify import verify_conversion as verify
    try:
        convert(
            arguments.source,
            arguments.target,
            target_format=arguments.to,
            weights=arguments.weights,
            subfolder=arguments.subfolder,
            prefix=arguments.prefix,
            run_config=arguments.config,
            dtype=arguments.dtype,
            force=arguments.force,
            model_fields={n: tuple(v) if isinstance(v, list) else v for n, v in fields.items() if v is not None},
            max_shard_bytes=arguments.max_shard_size,
            verify=verify,
            companions=companions,
        )
    except CheckpointError as error:
        raise SystemExit(f"{arguments.prog}: {error}") from None
    dtype = "" if arguments.dtype is None else f", {arguments.dtype}"
    print(f"{arguments.source} written to {arguments.target} ({arguments.to}{dtype})")


if __name__ == "__main__":
    sys.exit(main())
