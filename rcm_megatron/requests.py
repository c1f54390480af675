"""What each command is asked to do: one frozen dataclass a command, which its function takes and from which its options are derived.

`rcm_megatron.cli.options` reads a field's name (``--field-name``), type, default and docstring; `Option` says what those cannot. Imports
no torch, so that --help answers at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from rcm_megatron.registries import FORMATS, LORA_NAMINGS


@dataclass(frozen=True, kw_only=True)
class Option:
    """What a field's type does not say of its option."""

    flag: str = ""
    """In place of --field-name."""
    metavar: str | tuple[str, ...] | None = None
    parse: Callable[[str], Any] | None = None
    """From the command line's text; raises ValueError, whose message says got and need."""
    choices: Collection[str] | None = None
    """Asked when the options are made, so that a registry may be one."""
    positional: bool = False


FILE, FOLDER, ROLE = Option(metavar="FILE"), Option(metavar="DIR"), Option(metavar="ROLE")


def parse_bytes(text: str) -> int:
    """`5GB`, `500MB`, `20kB` or a plain number of bytes; units of 1000, as in Hugging Face's max_shard_size.

    Raises ValueError for others.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kMGT]?)B?", text, flags=re.IGNORECASE)
    size = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if size < 1:
        raise ValueError(f"got {text!r}; need a size such as 5GB, 500MB or a number of bytes")
    return size


def parse_size(text: str) -> tuple[int, int]:
    """`480x832`: (height, width). Raises ValueError for others."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise ValueError(f"got {text!r}, need HxW, e.g. 480x832")
    return int(height), int(width)


RESOLUTIONS = {"480p": (480, 832), "720p": (720, 1280)}
"""(height, width) as Wan's are."""


def parse_resolution(text: str) -> tuple[int, int]:
    """`480p`, `720p`, or as `parse_size`."""
    return RESOLUTIONS[text] if text in RESOLUTIONS else parse_size(text)


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """Run all stages of a configuration; start it with torchrun or srun."""


@dataclass(frozen=True, kw_only=True)
class CheckRequest:
    """Print a configuration, complete, or every reason why it cannot run."""

    world_size: Annotated[int, Option(metavar="N")]
    """processes it is to run on"""
    gpu: Annotated[str | None, Option(metavar="NAME")] = None
    """say what it takes of GPUs of this kind, a name or a file as for plan, and warn where they are too small"""
    field: Annotated[str | None, Option(metavar="KEY")] = None
    """print the value of this field alone, e.g. output_dir"""


@dataclass(frozen=True, kw_only=True)
class DryRunRequest:
    """Execute a run's real iterations without a GPU: memory, FLOPs, messages of a rank, simulated."""

    world_size: Annotated[int, Option(metavar="N")]
    """processes it is to run on"""
    rank: Annotated[int | None, Option(metavar="K")] = None
    """null: the first rank of the first pipeline stage, of the last, and of those with more blocks"""
    gpus_per_node: int = 8
    """which links are between nodes"""
    device: Literal["gpu", "cpu"] = "gpu"
    """whose decisions are taken: an H100's, or the CPU's as on Gloo"""
    whole: bool = False
    """execute every block and micro-batch; else deep networks and large batches are concluded from a few"""
    json: Annotated[Path | None, FILE] = None
    """write the report there"""
    picture: Annotated[Path | None, Option(metavar="FILE.png")] = None
    """draw it there"""


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """Find the layout and memory policies for a number of GPUs: memory, time and price of each, simulated."""

    gpus: Annotated[int, Option(metavar="N")]
    """GPUs that the run is to take"""
    gpu: Annotated[str, Option(metavar="NAME")] = "h100-80g"
    """a table of hardware (a100-80g, h100-80g, h200-141g, b200-180g), or a JSON file with one"""
    teacher: Annotated[str | None, Option(metavar="CONFIG")] = None
    """teacher and fake score are networks of this configuration: a large teacher of a smaller student"""
    resolution: Annotated[tuple[int, int] | None, Option(metavar="480p|720p|HxW", parse=parse_resolution)] = None
    """of the videos, in pixels"""
    seconds: Annotated[float | None, Option(metavar="S")] = None
    """length of the videos at 16 frames a second"""
    top: Annotated[int, Option(metavar="N")] = 5
    """how many of the fastest are listed"""
    confirm: Annotated[int, Option(metavar="N")] = 0
    """dry-run the fastest until so many are confirmed; minutes each. 0: formulas alone"""
    write: Annotated[Path | None, Option(metavar="FILE.yaml")] = None
    """write the fastest as a configuration there"""
    json: Annotated[Path | None, FILE] = None
    """write the report there"""
    picture: Annotated[Path | None, Option(metavar="FILE.png")] = None
    """draw what takes the time of the fastest there"""


@dataclass(frozen=True, kw_only=True)
class PreflightRequest:
    """Look at every node before a run and name the bad ones; one process a rank."""

    timeout: Annotated[float, Option(metavar="S")] = 50.0
    """seconds for all of it"""
    nodes: Annotated[str, Option(metavar="A,B")] = ""
    """the job's nodes in the order of ranks"""


@dataclass(frozen=True, kw_only=True)
class ConditioningFiles:
    """Of one image or video, which all samples are given."""

    image: Annotated[Path | None, FILE] = None
    """PNG, JPEG or WebP that videos begin with, for the run's encoders; with networks that are given frames it becomes the first"""
    image_latent: Annotated[Path | None, FILE] = None
    """in place of --image: its latent [C, T, H, W]"""
    image_embed: Annotated[Path | None, FILE] = None
    """beside --image-latent: CLIP features [L, D]"""
    conditional_latent: Annotated[Path | None, FILE] = None
    """Video2World, TI2V: a clean latent [C, t, H, W] to continue, with whose first frames every sample begins"""
    conditional_frames: int = 1
    """how many of its latent frames"""


@dataclass(frozen=True, kw_only=True)
class SampleRequest(ConditioningFiles):
    """Sample videos; one process, or torchrun on any layout. One for each prompt and embedding, all given the same image."""

    weights: Annotated[str, ROLE] = "ema"
    """a role of the run's networks, ROLE.ema for its average, or ema for the student's"""
    checkpoint: Path | None = None
    """a checkpoint or a folder of them; null: the run's latest"""
    steps: int | None = None
    """null: the most of sampling.student_steps, or sampling.teacher_steps"""
    prompts: Annotated[Sequence[str], Option(flag="--prompt")] = ()
    """a caption for the run's text encoder; may be given several times"""
    prompts_file: Annotated[Path | None, Option(flag="--prompts", metavar="FILE")] = None
    """.txt with a caption a line, or .jsonl"""
    embeddings: Annotated[Sequence[Path], Option(flag="--embedding", metavar="FILE")] = ()
    """an encoded caption [l, D] or [1, l, D], the way for a run without a text encoder; may be given several times"""
    copies: int = 1
    """videos of each caption, with other noise"""
    output: Annotated[Path, FOLDER]
    """folder for MP4s and latents"""


@dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """What videos are compared by."""

    features: Annotated[str, Option(metavar="NETWORK")] = "thumbnails"
    """thumbnails, which need no network, or module:function, yours: of (weights, device) it makes a callable [B, C, T, H, W] -> [B, F]"""
    feature_weights: Annotated[Path | None, FILE] = None
    """given to that function"""
    k: int = 5
    """neighbours of precision, recall, density and coverage"""


@dataclass(frozen=True, kw_only=True)
class EvaluateSamplersRequest(FeatureOptions):
    """Evaluate a run's teacher and students side by side, on the same noise and prompts; one process, or torchrun on any layout."""

    prompts: Annotated[Path, FILE]
    """.txt with a caption a line, or .jsonl"""
    weights: Annotated[Sequence[str], ROLE] = ()
    """a role of the run's networks or ROLE.ema; may be given several times, the first is what others are compared with; null: teacher, and
    the student's average where it has one"""
    steps: Annotated[Sequence[int], Option(metavar="N")] = ()
    """network evaluations; may be given several times; null: sampling.student_steps"""
    samples: int = 8
    """videos of each prompt, with other noise"""
    checkpoint: Path | None = None
    """a checkpoint or a folder of them; null: the run's latest"""
    reference: Annotated[Path | None, Option(metavar="PATH")] = None
    """real videos: a folder, or features as .safetensors or .npy; null: the first sampler's"""
    batch_size: Annotated[int | None, Option(metavar="N")] = None
    """videos sampled together; null: trainer.micro_batch_size"""
    output: Annotated[Path, FOLDER]
    """folder for videos and figures, on a disk that all ranks see; started again, what is finished there stays"""


@dataclass(frozen=True, kw_only=True)
class EvaluateFoldersRequest(FeatureOptions):
    """Evaluate folders of videos that exist already, beside a reference."""

    reference: Annotated[Path, Option(positional=True)]
    """folder of videos (the teacher's, or real ones), or features as .safetensors or .npy"""
    generated: Annotated[Sequence[Path], Option(positional=True, metavar="GENERATED")]
    """others, as NAME-0.mp4, NAME-1.mp4 … of each prompt"""
    size: Annotated[tuple[int, int] | None, Option(parse=parse_size, metavar="HxW")] = None
    """cut all videos to this, with --frames and --fps; null: they must have one size and length"""
    frames: Annotated[int | None, Option(metavar="T")] = None
    """of each"""
    fps: float | None = None
    """frames a second"""
    output: Annotated[Path, FOLDER]
    """folder for figures and pictures"""


@dataclass(frozen=True, kw_only=True)
class VBenchSampleRequest:
    """Sample VBench's prompts into the folder of videos that it scores; one process, or torchrun on any layout."""

    prompts: Annotated[Path, FILE]
    """VBench's prompts/all_dimension.txt: what names of files say"""
    long_prompts: Annotated[Path | None, FILE] = None
    """what the network is given, line for line: e.g. augmented_prompts/gpt_enhanced_prompts/all_dimension_longer.txt"""
    flickering: Annotated[Path | None, FILE] = None
    """VBench's prompts_per_dimension/temporal_flickering.txt, for more samples of these"""
    samples: int = 5
    """videos of each prompt"""
    flickering_samples: Annotated[int, Option(metavar="N")] = 25
    """of those of --flickering"""
    weights: Annotated[str, ROLE] = "ema"
    """a role of the run's networks, ROLE.ema for its average, or ema for the student's"""
    steps: int | None = None
    """null: the most of sampling.student_steps, or sampling.teacher_steps"""
    checkpoint: Path | None = None
    """a checkpoint or a folder of them; null: the run's latest"""
    batch_size: Annotated[int | None, Option(metavar="N")] = None
    """videos sampled together; null: trainer.micro_batch_size"""
    output: Annotated[Path, FOLDER]
    """DIR/videos is for VBench, DIR/manifest.json says how they were made; started again, what is finished there stays"""


@dataclass(frozen=True, kw_only=True)
class VBenchScoresRequest:
    """Print VBench's results side by side: 16 dimensions, quality, semantic, total by its normalisation."""

    results: Annotated[Sequence[str], Option(positional=True, metavar="NAME=PATH")]
    """*_eval_results.json, or a folder of one model's; the first, the teacher's, is what others are compared with"""
    json: Annotated[Path | None, FILE] = None
    """write them there"""


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """Write a trained network as a diffusers folder."""

    weights: Annotated[str, ROLE] = "ema"
    """a role of the run's networks, ROLE.ema for its average, or ema for the student's"""
    checkpoint: Path | None = None
    """a checkpoint or a folder of them; null: the run's latest"""
    output: Annotated[Path, FOLDER]
    """folder to write; with --lora a .safetensors file"""
    lora: bool = False
    """of a network that trains a LoRA: the LoRA alone"""
    merge: bool = False
    """of a network that trains a LoRA: the whole network, the LoRA merged into it"""
    naming: Annotated[str, Option(choices=LORA_NAMINGS)] = "diffusers"
    """of the LoRA's keys: native is ComfyUI's and LightX2V's"""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """of the weights"""
    force: bool = False
    """replace a checkpoint folder that is there"""
    verify: bool = False
    """load it with diffusers and compare the two networks before it appears under its name"""


@dataclass(frozen=True, kw_only=True)
class ConvertRequest:
    """Convert a checkpoint; the source's format is recognised."""

    source: Annotated[str, Option(positional=True)]
    """folder or file: diffusers, the Wan release, NVlabs rCM, NVIDIA Cosmos, internal, or a run"""
    target: Annotated[str, Option(positional=True)]
    """what to write: a folder, or a .pt/.safetensors file for nvlabs and nvidia"""
    to: Annotated[str, Option(choices=FORMATS)]
    """format of the target"""
    loras: Annotated[Sequence[str], Option(flag="--lora", metavar="FILE[:SCALE]")] = ()
    """a LoRA to merge, in any naming; may be given several times"""
    weights: Annotated[str | None, ROLE] = None
    """which of a run's networks: a role, or ema for the student's average"""
    subfolder: str | None = None
    """which of two experts: transformer_2, or low_noise_model"""
    prefix: str | None = None
    """read only the keys that begin with it, e.g. model.diffusion_model."""
    config: Annotated[Path | None, Option(metavar="YAML")] = None
    """of the run, if not where it was written"""
    dtype: str | None = None
    """fp32, bf16 or fp16; null: every tensor's own"""
    max_shard_size: Annotated[int, Option(parse=parse_bytes, metavar="SIZE")] = 5_000_000_000
    """of a file of a folder, e.g. 500MB"""
    num_heads: int | None = None
    """where the source does not say"""
    text_len: int | None = None
    """where the source does not say"""
    eps: float | None = None
    """where the source does not say; null: 1e-6"""
    patch_size: Annotated[tuple[int, int, int] | None, Option(metavar=("T", "H", "W"))] = None
    """where the source does not say; null: 1 2 2"""
    rope_scale: Annotated[tuple[float, float, float] | None, Option(metavar=("T", "H", "W"))] = None
    """where the source does not say"""
    second_time: bool = False
    """of a network of one time make one of two, whose second time changes nothing yet (objectives emd, lmd, mean_flow)"""
    force: bool = False
    """replace the target"""
    verify: bool = False
    """run source and target and compare them before it appears"""


@dataclass(frozen=True, kw_only=True)
class ExtractLoraRequest:
    """Write the low-rank part of the difference of two networks as a LoRA; report what it keeps, layer by layer."""

    teacher: Annotated[str, Option(positional=True)]
    """folder or file of any format: the network that the LoRA is for"""
    student: Annotated[str, Option(positional=True)]
    """folder or file: the network that it makes of it"""
    output: Annotated[Path, Option(metavar="FILE.safetensors")]
    """what to write"""
    rank: int = 64
    """of every layer; with --energy the largest"""
    energy: float | None = None
    """the smallest rank of each layer that keeps this share of its squared difference"""
    naming: Annotated[str, Option(choices=LORA_NAMINGS)] = "diffusers"
    """of the keys: native is ComfyUI's and LightX2V's"""
    differences: bool = False
    """native: also write what no low rank holds, norms, modulation and biases, as .diff"""
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """of the factors"""
    num_heads: int | None = None
    """where the networks do not say"""
    report: Annotated[Path | None, Option(metavar="FILE.json")] = None
    """write what was kept of each layer there"""
    force: bool = False
    """replace the file"""


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """Where a dataset goes and how it is stored; kill and restart it at will."""

    output: Annotated[Path, FOLDER]
    """folder to write"""
    samples_per_shard: int = 256
    member_format: Literal["pt", "npy", "safetensors"] = "pt"
    dtype: Literal["bf16", "fp32"] = "bf16"
    """of latents and embeddings"""
    full_text: bool = False
    """keep the zeros after a prompt's embedding, as the published dataset has them; else a sample has its positions alone"""


@dataclass(frozen=True, kw_only=True)
class TeacherRequest(BuildRequest):
    """Build a dataset of samples of a run's teacher, on any layout. The noise of sample i follows from (seed, i) alone."""

    prompts: Annotated[Path, FILE]
    """.txt with a caption a line, or .jsonl with `prompt`"""
    samples_per_prompt: int = 1
    batch_size: int | None = None
    """samples drawn together; null: trainer.micro_batch_size"""
    steps: int = 100
    """Euler steps"""
    shift: float = 3.0
    """of the time grid"""
    guidance: float = 5.0
    """classifier-free guidance"""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class VideosRequest(BuildRequest):
    """Build a dataset of a folder of videos with captions beside them: one clip from the beginning of each."""

    videos: Annotated[Path, FOLDER]
    """videos, <name>.txt or .json beside each"""
    frames: Annotated[int | None, Option(metavar="T")] = None
    """frames of a clip; null: those of the configuration"""
    size: Annotated[tuple[int, int] | None, Option(parse=parse_size, metavar="HxW")] = None
    """pixels; null: those of the configuration"""
    fps: float = 16.0
    """frames a second, Wan's are 16"""
    on_error: Literal["skip", "raise"] = "skip"
    """for videos that give no clip"""


@dataclass(frozen=True, kw_only=True)
class LatentsRequest(BuildRequest):
    """Build a dataset of another one's latents: decoded, clamped to [-1, 1] and encoded, as the official loader does at every step."""

    data: Annotated[Path, FOLDER]
    """the other dataset; captions, embeddings and image members stay, and key i is row i of its manifest"""
    on_error: Literal["skip", "raise"] = "skip"
    """for samples that cannot be read"""


@dataclass(frozen=True, kw_only=True)
class InspectDatasetRequest:
    """Verify a dataset folder, print its statistics, draw a contact sheet. Status 1 if anything is damaged."""

    folder: Annotated[Path, Option(positional=True)]
    """of shards; every byte is read"""
    decode: Annotated[Path | None, FOLDER] = None
    """diffusers checkpoint whose vae/ decodes the latents; else pictures show latents, of many channels their main directions (PCA)"""
    output: Annotated[Path | None, Option(metavar="FILE.png")] = None
    """contact sheet; null: none"""
    samples: int = 12
    """on the contact sheet"""
    frames: int = 5
    """of each sample"""


@dataclass(frozen=True, kw_only=True)
class PlotRequest:
    """Draw one or several training runs from their metrics.jsonl: losses, norms, rates, seconds by phase, memory, counters."""

    runs: Annotated[Sequence[Path], Option(positional=True, metavar="RUN_FOLDER")]
    """output_dir of a run, or a metrics.jsonl"""
    output: Annotated[Path | None, Option(metavar="PNG")] = None
    """null: run.png in the first run's folder"""


@dataclass(frozen=True, kw_only=True)
class ConformanceRequest:
    """Replay a golden file (numbers of NVlabs/rcm) on any parallel layout. Status 1 if a number is past its bound."""

    file: Annotated[Path, Option(positional=True)]
    """e.g. tests/golden/nvlabs_rcm_deep.safetensors"""
    layout: Annotated[Sequence[str], Option(positional=True, metavar="KEY=VALUE")] = ()
    """tp= ring= ulysses= pp= vpp= chunk_layers=1,3 micro_batch_size=; data parallel is what remains"""
    cases: Annotated[Sequence[str], Option(flag="--case")] = ()
    """only this case; may be given several times"""
