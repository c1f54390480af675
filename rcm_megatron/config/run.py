"""Everything of a run but its networks: objectives, stages, data, trainer, sampling, logging."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, Literal

from rcm_megatron.config import roles
from rcm_megatron.config.declare import (
    AttributeOf,
    Bounds,
    ByName,
    FilePath,
    NotNegative,
    NotNegativeFloat,
    Positive,
    PositiveFloat,
)
from rcm_megatron.config.model import (
    BY_FAMILY,
    FP8_ALIGNMENT,
    LatentConfig,
    ModelConfig,
    ParallelConfig,
    PrecisionConfig,
)
from rcm_megatron.config.networks import NetworkConfig
from rcm_megatron.config.stages import stage_problems
from rcm_megatron.registries import OBJECTIVES


@dataclass(frozen=True, kw_only=True)
class TimeDistribution:
    """How training times are drawn. `lognormal`: t = atan(exp(std * z + mean)), z normal. `uniform_shift`: RF time
    s = shift * u / (1 + (shift - 1) * u), u uniform, t = atan(s / (1 - s))."""

    kind: Literal["lognormal", "uniform_shift"]
    mean: float | None = None
    """lognormal only, and required there."""
    std: PositiveFloat | None = None
    """lognormal only, and required there."""
    shift: PositiveFloat | None = None
    """uniform_shift only, and required there; 1 is uniform in RF time."""

    def check(self, path: str) -> Iterator[str]:
        """Each kind has its own parameters."""
        belongs = {"lognormal": ("mean", "std"), "uniform_shift": ("shift",)}[self.kind]
        for name in ("mean", "std", "shift"):
            value = getattr(self, name)
            if name in belongs and value is None:
                yield f"{path}.{name} is required when {path}.kind={self.kind}; set it"
            elif name not in belongs and value is not None:
                yield f"{path}.{name}={value} has no meaning when {path}.kind={self.kind}; remove it"


SIDES = ("high", "low")
"""Of `distillation.expert_boundary`: more noise, and less."""


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """What the objectives of all stages share (symbols as in rCM, arXiv 2510.08431)."""

    teacher_guidance: PositiveFloat
    """Classifier-free guidance of the teacher, uncond + w (cond - uncond); 1 takes one conditional pass."""
    p_g: TimeDistribution
    """Times of sCM and dCM, and of flow maps that have no law of their own."""
    p_d: TimeDistribution
    """Times of DMD and the fake score, and of the rollout's intermediate steps."""
    max_rollout_steps: Positive = 4
    """Backward simulation takes 1 to this many student steps, in turn."""
    fixed_rollout_times: tuple[float, ...] | None = None
    """TrigFlow times between rollout steps, e.g. [1.5, 1.4, 1.0]; null draws them from p_d."""
    rollout: Literal["renoise", "flow_map"] = "renoise"
    """From a step of backward simulation to the next time. renoise: noise is added to the student's x0. flow_map: a student of two times
    (model.second_time) maps there itself, without noise."""
    expert_boundary: Annotated[float, Bounds(gt=0, lt=1)] | None = None
    """RF time at which the network `teacher` takes over from `teacher_low_noise`, and every other role that is two from its second (Wan2.2
    A14B: 0.875 text-to-video, 0.9 image-to-video)."""
    conditional_frames: tuple[NotNegative, ...] | None = None
    """Video2World and TI2V (model.conditional_frames): how many first latent frames of a sample the networks are given, one of these
    numbers, all equally likely. null: none."""

    def rollout_choices(self, side: Literal["high", "low"] | None = None) -> tuple[int, ...]:
        """The numbers of rollout steps whose last one can lie on ``side`` of `expert_boundary`; None: all."""
        every = range(1, self.max_rollout_steps + 1)
        if side is None:
            return tuple(every)
        if self.fixed_rollout_times is None:
            return tuple(every) if side == "high" else tuple(every)[1:]
        last = (math.pi / 2, *self.fixed_rollout_times)
        boundary = math.atan2(self.expert_boundary, 1 - self.expert_boundary)
        return tuple(steps for steps in every if (last[steps - 1] >= boundary) == (side == "high"))

    def check(self, path: str) -> Iterator[str]:
        """Times of a rollout's steps."""
        if self.fixed_rollout_times is not None:
            yield from check_step_times(f"{path}.fixed_rollout_times", self.fixed_rollout_times, self.max_rollout_steps)


def check_step_times(path: str, times: tuple[float, ...], steps: int) -> Iterator[str]:
    """TrigFlow times between ``steps`` steps fall from below pi/2 to above 0."""
    if len(times) < steps - 1:
        yield f"{path}={list(times)}: got {len(times)} times, need at least {steps - 1} for {steps} steps; add some"
    if not all(a > b for a, b in zip((math.pi / 2, *times), (*times, 0.0), strict=True)):
        yield f"{path}={list(times)} must fall from below pi/2 to above 0, e.g. [1.5, 1.4, 1.0]"


def _weights() -> Mapping[str, Any]:
    return dict.fromkeys(OBJECTIVES, PositiveFloat)


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A stretch of the run with one set of objectives. Networks and EMA go on from stage to stage; the iteration `i` that warm-up and
    alternation look at starts at 0 in each."""

    name: str
    steps: Positive
    """Iterations, those of companions among them."""
    losses: Annotated[Mapping[str, float], ByName(_weights)]
    """Objective -> loss weight. Their sum trains one network; what they bring along (`dmd` the `fake_score`) has the weight 1."""
    tangent_warmup: NotNegative = 0
    """Iterations over which r rises from 0 to 1 (scm). None of them is a companion's, and dmd waits for their end."""
    student_update_freq: Positive = 1
    """After the warm-up one iteration in this many is of the losses, the others of their companions, in turn. 1: there are none."""
    lr: Mapping[str, NotNegativeFloat] = field(default_factory=dict)
    """Role -> the learning rate of its network in this stage, of both where it is two and ROLE_low_noise has none of its own; absent: the
    optimizer's."""
    reset_optimizer: bool | None = None
    """Begin the stage with zero moments, Adam's step count at 0 and lr warmed up anew. null: of the networks whose objectives are not those
    of the stage that trained them before, whose second moments would be of other gradients (dCM's are sqrt(N) times sCM's)."""

    def check(self, path: str) -> Iterator[str]:
        """Objectives against each other and the alternation of networks."""
        yield from stage_problems(self, f"{path} ({self.name})")


@dataclass(frozen=True, kw_only=True)
class EncodersConfig:
    """What stands between pixels and captions and the network. `none`: shards hold latents and embeddings already,
    and sampling writes latents."""

    video: Literal["pixels", "wan_vae", "none"]
    """wan_vae: `folder`/vae, of Wan2.1 and Cosmos-Predict2 (16 channels) or Wan2.2 (48). Loaded for samples and
    previews only, and freed after."""
    text: Literal["words", "umt5", "t5", "none"]
    """umt5 (Wan), t5 (Cosmos): `folder`/text_encoder and `folder`/tokenizer. One rank loads it (11 GB in bf16), encodes, frees it,
    and sends the rest their embeddings."""
    image: Literal["clip", "none"] = "none"
    """clip: `folder`/image_encoder and `folder`/image_processor, for networks with model.image_dim. Used by `sample --image` alone."""
    folder: FilePath | None = None
    """A local diffusers checkpoint, e.g. Wan2.1-T2V-1.3B-Diffusers; required by wan_vae, umt5, t5 and clip."""
    negative_prompt: str | None = None
    """Caption of the unconditional branch; null: the release's own with umt5 and t5, the empty caption with words. Set "" to train
    flow matching with umt5 or t5: caption dropout wants the empty caption."""
    text_dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 on a GPU, fp32 on the CPU."""
    vae_dtype: Literal["fp32", "bf16"] = "fp32"
    """diffusers' advice for Wan is fp32; bf16 halves time and memory."""
    vae_tiling: bool = False
    """Work on overlapping tiles of 256 pixels: fits small GPUs, takes longer, and changes the numbers slightly at seams."""

    def check(self, path: str) -> Iterator[str]:
        """What reads the folder, and what encodes the negative prompt."""
        for name in ("video", "text", "image"):
            value = getattr(self, name)
            if value in ("wan_vae", "umt5", "t5", "clip") and self.folder is None:
                yield (
                    f"{path}.folder=null, but {path}.{name}={value} reads it; name a local diffusers checkpoint with vae/, "
                    "text_encoder/ and tokenizer/"
                )
        if self.text == "none" and self.negative_prompt is not None:
            yield (
                f"{path}.negative_prompt={self.negative_prompt!r} needs a text encoder, got {path}.text=none; remove it "
                f"or set {path}.text"
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A folder of WebDataset shards (*.tar) with <key>.latent, <key>.embed and <key>.prompt members (.pt, .npy or
    .safetensors). Its manifest is made beside them at the first start."""

    folder: FilePath
    negative_embedding: FilePath | None = None
    """File with the text embedding of the unconditional branch. null: the text encoder's (which must not be `none`)."""
    on_error: Literal["skip", "raise"] = "raise"
    """skip: an unreadable shard or member is named, counted and replaced by the next sample."""
    num_threads: Positive = 2
    prefetch: Positive = 2
    """Batches decoded ahead of the step."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Batch and checkpoints. Order of data, noise and times follow from the run's seed, not from ranks."""

    global_batch_size: Positive
    """Samples of one update, over all data-parallel ranks and micro-batches."""
    micro_batch_size: Positive = 1
    log_every: Positive = 1
    sample_every: Annotated[int, Bounds(ge=0, note="0: no samples")] = 0
    """Iterations between sample videos; 0: none."""
    checkpoint_every: Positive
    keep_checkpoints: Positive = 2
    """Newest checkpoints that are kept; older ones are deleted after a new one is complete, the last of them when an update has shown that
    the new one is good. With 1 there is then none to go back to when its files are damaged."""
    keep_every: Annotated[int, Bounds(ge=0, note="0: none")] = 0
    """Checkpoints of iterations divisible by this are never deleted; a multiple of checkpoint_every, or 0: none."""
    async_checkpoint: bool = True
    """Train on while a checkpoint is written: a step waits for a copy of the rank's part of it in host memory (pinned, with CUDA), which
    is needed until it is on disk. False: wait for the disk, and copy nothing."""
    resume: bool = True
    """Continue from the newest complete checkpoint under output_dir, if there is one. False: begin anew, once: what is there goes to
    output_dir/before_N, and then the run continues from its own checkpoints after crashes, requeues and signals as always."""
    max_refused_updates: Positive | None = 10
    """The run ends with status 88, its newest good checkpoint kept, when so many updates in a row, of one network or of all, were refused
    for gradients that are not finite, or because no sample was left. null: never."""
    profile: Positive | None = None
    """Trace so many iterations with PyTorch's profiler, after the first three of every start, into output_dir/profile: a file of the first
    rank of each pipeline stage; on CUDA a snapshot of its memory too. They are slower than others. null: none."""
    stop_after: Positive | None = None
    """Save and leave after this iteration of the run (counted over stages); null: the end of the last stage."""
    hang_timeout: Annotated[float, Bounds(gt=0)] | None = 1800.0
    """Seconds without a step (or a checkpoint) after which every rank writes its stacks to output_dir/stacks and ends with status 86;
    what comes before the end of the first step may take three times as long. null: wait for ever."""

    def check(self, path: str) -> Iterator[str]:
        """What is kept must have been written."""
        if self.keep_every % self.checkpoint_every:
            yield (
                f"{path}.keep_every={self.keep_every} must be a multiple of {path}.checkpoint_every={self.checkpoint_every}, or no such "
                "checkpoint is ever written; 0 keeps none"
            )


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Time for memory, each policy with its price. The tables of docs/memory.md were measured."""

    recompute: Literal["none", "selective", "attention", "full"] = "full"
    """What plain passes keep for the backward pass. none: every activation. selective: what linears and attention put out; norms,
    modulation, GELU, RoPE, gathers and Ulysses' messages run again (Transformer Engine's linears too). attention: a block's input and what
    its self-attention puts out. full: the block's input; one more forward. The dual pass keeps a block's primal input and, of all but
    full, the primal that self-attention puts out: one hidden state a block more, for which its backward runs no attention and no ring."""
    free_idle_gradients: bool = False
    """Free the fp32 gradients of the network that a step does not train: 4 bytes a parameter of the rank less (dp and cp do not share
    them) where two are trained; an allocation a step, and large blocks in the allocator that may not fit together again."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Defaults of `sample` and of the samples written during training."""

    student_sampler: Literal["renoise", "flow_map"] = "renoise"
    """renoise: denoise, and add noise for the next of student_times. flow_map: a student of two times (model.second_time) maps from time to
    time, deterministically, in any number of steps."""
    student_steps: Annotated[tuple[Positive, ...], Bounds(count=1)] = (1, 2, 4)
    """Step counts to sample the student with; each 1 to 4 with the sampler renoise."""
    student_times: tuple[float, ...] = (1.5, 1.4, 1.0)
    """renoise: TrigFlow times between the student's steps; n steps use the first n - 1."""
    student_shift: PositiveFloat = 5.0
    """flow_map: shift of the student's RF time grid, which begins at sigma_max and ends at 0."""
    sigma_max: PositiveFloat = 80.0
    """Noise level the student starts at, t = atan(sigma_max). Training draws are not bounded by it."""
    teacher_sampler: Literal["euler", "unipc"] = "unipc"
    teacher_steps: Positive = 50
    teacher_shift: PositiveFloat = 5.0
    """Shift of the teacher's RF time grid."""
    guidance: PositiveFloat = 5.0
    """Classifier-free guidance of the teacher when it is sampled."""
    num_samples: Positive = 4
    seed: int = 0
    fps: Positive = 16

    def check(self, path: str) -> Iterator[str]:
        """A time between every two steps of the longest sampling."""
        steps = max(self.student_steps) if self.student_sampler == "renoise" else 1
        yield from check_step_times(f"{path}.student_times", self.student_times, steps)


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Metrics go to <output_dir>/metrics.jsonl, and to Weights & Biases."""

    wandb_mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: what WANDB_MODE says; without it online when there is an API key or a login and the service answers, else offline. WANDB_MODE
    can make the others quieter, never louder."""
    wandb_project: str = "rcm_megatron"
    progress_bar: bool = True
    peak_tflops: PositiveFloat | None = None
    """Dense peak of one device, TFLOP/s, of which MFU is a share. null: that of the GPU if it is known and the run is bf16; else no MFU."""


def _settings() -> Mapping[str, type]:
    return AttributeOf(OBJECTIVES, "Settings")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run, complete. `load_config` reads it from YAML, `validate` checks it against a world size."""

    name: str
    seed: int = 0
    output_dir: FilePath
    plugins: tuple[str, ...] = ()
    """Python modules, installed beside this program, that register objectives of their own when they are imported (docs/EXTENDING.md)."""
    model: Annotated[ModelConfig, BY_FAMILY]
    latent: LatentConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig
    networks: Mapping[str, NetworkConfig]
    """Role -> network: teacher, student, fake_score and whatever else the objectives ask for. ROLE_low_noise: of a role that is two
    networks (Wan2.2 A14B) the one of RF times below `distillation.expert_boundary`; ROLE has the others. Of a trained role the two are
    updated in turn, each on times of its side."""
    distillation: DistillationConfig
    objectives: Annotated[Mapping[str, Any], ByName(_settings)] = field(default_factory=dict)
    """Objective -> its settings; absent: its defaults."""
    stages: tuple[StageConfig, ...]
    encoders: EncodersConfig
    data: DataConfig
    trainer: TrainerConfig
    memory: MemoryConfig = MemoryConfig()
    sampling: SamplingConfig = SamplingConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def total_steps(self) -> int:
        """Iterations of all stages."""
        return sum(stage.steps for stage in self.stages)

    @cached_property
    def roles(self) -> tuple[str, ...]:
        """The networks that the stages need, in the order in which they are built: those that stay as they are come first, because
        what is whole for a moment before it is sharded then finds the device empty."""
        return roles.needed_roles(self.stages, self.networks)

    @cached_property
    def objectives_used(self) -> tuple[str, ...]:
        """The objectives of all stages with their companions, in the order of the registry."""
        return roles.objectives_of(self.stages)

    @cached_property
    def trained_roles(self) -> tuple[str, ...]:
        """Those of `roles` that a stage trains."""
        return roles.trained_roles(self.stages, self.networks)

    @cached_property
    def tangent_roles(self) -> tuple[str, ...]:
        """Those of `trained_roles` of which a stage takes a tangent."""
        return roles.tangent_roles(self.stages, self.networks)

    @property
    def sides(self) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
        """Of the trained roles that are two networks: role -> side -> the numbers of rollout steps that its updates may take."""
        pairs = [role for role in self.trained_roles if roles.low_noise_of(role) in self.trained_roles]
        steps = self.distillation.rollout_choices
        return {role: {side: steps(side if role == "student" else None) for side in SIDES} for role in pairs}

    def model_path(self, role: str) -> str:
        """Where the architecture of a network is described."""
        return "model" if self.networks[role].model is None else f"networks.{role}.model"

    def model_of(self, role: str) -> ModelConfig:
        """The architecture of a network."""
        return self.networks[role].model or self.model

    def parallel_of(self, role: str) -> ParallelConfig:
        """How a network is cut over ranks: `parallel`, with the network's own pieces of a pipeline."""
        own, layers = self.networks[role].chunk_layers, self.model_of(role).num_layers
        if own is None and layers == self.model.num_layers:
            return self.parallel
        return replace(self.parallel, chunk_layers=own)

    def init_of(self, role: str) -> str | None:
        """The checkpoint that a network starts from, its own or the teacher's (of its side); None: random weights from the run's seed."""
        teachers = [self.networks.get(name) for name in ("teacher_low_noise", "teacher")]
        of_side = teachers[1:] if roles.first_of(role) == role else teachers
        return next((network.init for network in (self.networks[role], *of_side) if network and network.init), None)

    def trains_lora(self, role: str) -> bool:
        """Whether a stage trains a LoRA of the role's network, and so not its weights."""
        return role in self.trained_roles and self.networks[role].lora is not None

    def base_of(self, role: str) -> str:
        """The first of `roles` that holds the same weights all the time: one that begins alike, and trains a LoRA or nothing."""
        return next(other for other in (*self.roles, role) if other == role or self._holds_alike(other, role))

    def _holds_alike(self, first: str, second: str) -> bool:
        networks = [self.networks[role] for role in (first, second)]
        keeps = all(
            n.lora is not None or role not in self.trained_roles
            for n, role in zip(networks, (first, second), strict=True)
        )
        begins = [(self.init_of(role), self.model_of(role), self.parallel_of(role)) for role in (first, second)]
        computes = [(network.weights, network.fp8) for network in networks]
        return keeps and begins[0] == begins[1] and computes[0] == computes[1]

    @property
    def token_multiple(self) -> int:
        """Of what the tokens of a rank must be a multiple. One number for all networks: they share the layout of tokens."""
        return FP8_ALIGNMENT if any(self.networks[role].fp8 for role in self.roles if role in self.networks) else 1

    def layout_summary(self, world_size: int) -> str:
        """How ``world_size`` ranks share the work, in one line; for a configuration that is valid on them."""
        parallel, dp = self.parallel, self.parallel.dp(world_size)
        micro_batches = self.trainer.global_batch_size // (self.trainer.micro_batch_size * dp)
        return (
            f"{world_size} processes: tp={parallel.tp} cp={parallel.cp} pp={parallel.pp} vpp={parallel.vpp} dp={dp}, "
            f"{self.latent.num_tokens(self.model.patch_size)} tokens, {micro_batches} micro-batches per update"
        )
