"""Checks of a run configuration that need neither weights nor torch: each problem as got, need, fix.

A check is a generator of messages; `validate` collects them all, so one start shows every problem.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from rcm_megatron.config.errors import ConfigError
from rcm_megatron.config.model import FP8_ALIGNMENT, WAN_MASK_CHANNELS, LatentConfig, ModelConfig, ParallelConfig
from rcm_megatron.config.run import OptimizerConfig, RunConfig, StageConfig, TimeDistribution


def validate(config: RunConfig, world_size: int) -> None:
    """Raise ConfigError with every reason why `config` cannot run on `world_size` ranks."""
    problems = [
        *_model(config.model),
        *_latent(config.latent, config.model),
        *_image_channels(config),
        *_layout(config.parallel, config.model),
        *_world(config, world_size),
        *_precision(config),
        *_networks(config),
        *_distillation(config),
        *_given_frames(config),
        *(problem for i, stage in enumerate(config.stages) for problem in _stage(stage, f"stages.{i} ({stage.name})")),
        *_stage_list(config.stages),
        *_optimizers(config),
        *_encoders(config),
        *_data(config),
        *_counts(config),
        *_sampling(config),
        *_logging(config),
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _divisors(number: int) -> str:
    found = [str(i) for i in range(1, number + 1) if number % i == 0]
    return f"{', '.join(found[:-1])} or {found[-1]}" if len(found) > 1 else found[0]


def _positive(section: str, config: object, names: str) -> Iterator[str]:
    for name in names.split():
        if getattr(config, name) <= 0:
            yield f"{section}.{name}={getattr(config, name)} must be greater than 0"


def _model(model: ModelConfig) -> Iterator[str]:
    bad = list(
        _positive(
            "model",
            model,
            "num_layers hidden_size num_heads ffn_hidden_size in_channels out_channels text_dim text_len freq_dim eps"
            " rope_max_seq_len",
        )
    )
    yield from bad
    if min(model.patch_size) <= 0:
        yield f"model.patch_size={list(model.patch_size)} must hold numbers greater than 0"
    if bad:
        return
    if model.hidden_size % model.num_heads:
        yield (
            f"model.hidden_size={model.hidden_size} must divide by model.num_heads={model.num_heads}; "
            f"nearest: hidden_size={round(model.hidden_size / model.num_heads) * model.num_heads}"
        )
    elif model.head_dim % 2 or model.head_dim < 6:
        yield (
            f"model.hidden_size / model.num_heads = {model.head_dim} must be even and at least 6 "
            "(rotary embedding turns pairs of channels on three axes); change model.num_heads"
        )
    if model.freq_dim % 2:
        yield f"model.freq_dim={model.freq_dim} must be even (sines and cosines); use {model.freq_dim + 1}"
    yield from _family(model)
    if model.in_channels != model.out_channels:
        yield (
            f"model.out_channels={model.out_channels} must equal model.in_channels={model.in_channels}: "
            "the network predicts a velocity of its input's shape"
        )


def _family(model: ModelConfig) -> Iterator[str]:
    """What the family asks of the shared fields, and of its own. Sizes are positive."""
    cosmos = model.cosmos
    if (model.family == "cosmos") != (cosmos is not None):
        fix = (
            "give at least model.cosmos.rope_scale" if cosmos is None else "remove model.cosmos, or set family: cosmos"
        )
        yield f"model.family={model.family} with model.cosmos={'null' if cosmos is None else 'given'}; {fix}"
    yield from _wan(model)
    if model.family != "cosmos" or cosmos is None:
        return
    if model.freq_dim != model.hidden_size:
        yield f"model.freq_dim={model.freq_dim} must equal model.hidden_size={model.hidden_size} for family cosmos; set it so"
    if model.cross_attn_norm:
        yield "model.cross_attn_norm=true is Wan's; family cosmos modulates before cross-attention: set it to false"
    if model.head_dim < 12:
        yield f"model.hidden_size / model.num_heads = {model.head_dim} must be at least 12 to stretch RoPE; lower model.num_heads"
    yield from _positive("model.cosmos", cosmos, "adaln_lora_dim condition_sigma qk_norm_eps")
    if min(cosmos.rope_scale) <= 0 or min(cosmos.max_size) <= 0:
        yield "model.cosmos.rope_scale and max_size must hold numbers greater than 0"
    if cosmos.rope_fps is not None and cosmos.rope_fps <= 0:
        yield f"model.cosmos.rope_fps={cosmos.rope_fps} must be greater than 0, or null for images"
    if cosmos.conditional_frames and model.patch_size[0] != 1:
        yield f"model.patch_size={list(model.patch_size)} must begin with 1 with conditional_frames: each frame has its timestep"


def _image_channels(config: RunConfig) -> Iterator[str]:
    wan, need = config.model.wan, WAN_MASK_CHANNELS + config.latent.channels
    if wan is not None and wan.condition_channels not in (0, need):
        yield (
            f"model.wan.condition_channels={wan.condition_channels} must be {need}: a mask of {WAN_MASK_CHANNELS} channels and an "
            f"image's latent of latent.channels={config.latent.channels}; or 0 for none"
        )


def _wan(model: ModelConfig) -> Iterator[str]:
    wan = model.wan
    if wan is None:
        return
    if model.family != "wan":
        yield f"model.family={model.family} with model.wan given; remove model.wan, or set family: wan"
    for name in ("condition_channels", "image_dim", "image_positions"):
        value = getattr(wan, name)
        if value is not None and value < (0 if name == "condition_channels" else 1):
            yield f"model.wan.{name}={value} must be greater than 0, or {'0' if name == 'condition_channels' else 'null'} for none"
    if wan.image_positions is not None and wan.image_dim is None:
        yield (
            f"model.wan.image_positions={wan.image_positions} places CLIP tokens, but model.wan.image_dim=null has none; set it (1280), or "
            "image_positions to null"
        )
    if wan.conditional_frames and model.patch_size[0] != 1:
        yield f"model.patch_size={list(model.patch_size)} must begin with 1 with conditional_frames: each frame has its timestep"


def _latent(latent: LatentConfig, model: ModelConfig) -> Iterator[str]:
    yield from _positive("latent", latent, "channels frames height width")
    if latent.channels != model.in_channels:
        yield f"latent.channels={latent.channels} must equal model.in_channels={model.in_channels}; set both alike"
    if min(model.patch_size) <= 0:
        return
    axes = ("frames", "height", "width")
    for axis, size, patch in zip(axes, latent.shape_CTHW[1:], model.patch_size, strict=True):
        if size % patch:
            yield (
                f"latent.{axis}={size} must divide by {patch} (model.patch_size={list(model.patch_size)}); "
                f"set it to {size // patch * patch or patch} or {(size // patch + 1) * patch}"
            )
        if size // patch > model.rope_max_seq_len:
            yield (
                f"latent.{axis}={size} makes {size // patch} tokens on an axis, more than "
                f"model.rope_max_seq_len={model.rope_max_seq_len}; raise that or shrink the latent"
            )
    if model.cosmos is not None and model.cosmos.learnable_positions:
        for axis, size, most in zip(axes, latent.shape_CTHW[1:], model.cosmos.max_size, strict=True):
            if size > most:
                yield f"latent.{axis}={size} exceeds model.cosmos.max_size={list(model.cosmos.max_size)}; shrink the latent"


def _layout(parallel: ParallelConfig, model: ModelConfig) -> Iterator[str]:
    bad = list(_positive("parallel", parallel, "tp ring ulysses pp vpp"))
    yield from bad
    if bad or model.num_heads <= 0:
        return
    yield from _pipeline(parallel, model)
    if model.num_heads % parallel.tp:
        yield (
            f"model.num_heads={model.num_heads} must divide by parallel.tp={parallel.tp}; "
            f"set parallel.tp to {_divisors(model.num_heads)}"
        )
    elif model.num_heads % (parallel.tp * parallel.ulysses):
        yield (
            f"model.num_heads={model.num_heads} must divide by parallel.ulysses*tp={parallel.ulysses * parallel.tp}; "
            f"set parallel.ulysses to {_divisors(model.num_heads // parallel.tp)} and take the rest as parallel.ring"
        )
    if model.ffn_hidden_size % parallel.tp:
        yield (
            f"model.ffn_hidden_size={model.ffn_hidden_size} must divide by parallel.tp={parallel.tp}; "
            f"set parallel.tp to a divisor of both it and model.num_heads={model.num_heads}"
        )


def _pipeline(parallel: ParallelConfig, model: ModelConfig) -> Iterator[str]:
    """Blocks on stages. `parallel`'s degrees are positive."""
    chunks = f"pp*vpp = {parallel.pp}*{parallel.vpp} = {parallel.num_chunks}"
    if parallel.vpp > 1 and parallel.pp == 1:
        yield f"parallel.vpp={parallel.vpp} interleaves the chunks of 2 or more stages, got parallel.pp=1; set vpp to 1"
    if parallel.num_chunks > model.num_layers:
        yield (
            f"model.num_layers={model.num_layers} cannot give each of parallel.{chunks} pieces a block; "
            "lower parallel.pp or parallel.vpp"
        )
    elif parallel.chunk_layers is not None:
        layers = list(parallel.chunk_layers)
        even = [len(blocks) for blocks in replace(parallel, chunk_layers=None).layer_ranges(model.num_layers)]
        if len(layers) != parallel.num_chunks or sum(layers) != model.num_layers or min(layers, default=0) < 1:
            yield (
                f"parallel.chunk_layers={layers} must hold {parallel.num_chunks} counts of 1 or more ({chunks}) whose sum is "
                f"model.num_layers={model.num_layers}; e.g. {even}, or null"
            )


def _world(config: RunConfig, world_size: int) -> Iterator[str]:
    parallel, trainer = config.parallel, config.trainer
    bad = list(_positive("trainer", trainer, "micro_batch_size global_batch_size"))
    yield from bad
    if bad or min(parallel.tp, parallel.ring, parallel.ulysses, parallel.pp) <= 0:
        return
    size = parallel.model_parallel_size
    layout = f"tp*ring*ulysses*pp = {parallel.tp}*{parallel.ring}*{parallel.ulysses}*{parallel.pp} = {size}"
    if world_size % size:
        start = f"start {math.ceil(world_size / size) * size} processes"
        yield f"got {world_size} processes, need a multiple of {layout}; {start} or lower a parallel degree"
        return
    dp = parallel.dp(world_size)
    step = trainer.micro_batch_size * dp
    if trainer.global_batch_size % step:
        yield (
            f"trainer.global_batch_size={trainer.global_batch_size} must divide by micro_batch_size*dp = "
            f"{trainer.micro_batch_size}*{dp} = {step} (dp = {world_size} processes / {size}); "
            f"set it to {math.ceil(trainer.global_batch_size / step) * step}"
        )
        return
    yield from _micro_batches(config, dp)


def _micro_batches(config: RunConfig, dp: int) -> Iterator[str]:
    """The interleaved schedule wants whole rounds of pp micro-batches."""
    parallel, trainer = config.parallel, config.trainer
    count = trainer.global_batch_size // (trainer.micro_batch_size * dp)
    if parallel.vpp > 1 and parallel.pp > 1 and count % parallel.pp:
        step = trainer.micro_batch_size * dp * parallel.pp
        yield (
            f"parallel.vpp={parallel.vpp} needs a number of micro-batches that divides by parallel.pp={parallel.pp}, got {count} "
            f"(global_batch_size / (micro_batch_size * dp)); set trainer.global_batch_size to "
            f"{math.ceil(trainer.global_batch_size / step) * step}, or vpp to 1"
        )


def _precision(config: RunConfig) -> Iterator[str]:
    precision = config.precision
    fp8 = f"precision.fp8={list(precision.fp8)}"
    if precision.linear_layers == "transformer_engine" and precision.params_dtype == "fp32":
        yield (
            "precision.linear_layers=transformer_engine with params_dtype=fp32 would multiply in TF32 (Transformer Engine has no other "
            "way); set linear_layers to auto or local, or params_dtype to bf16"
        )
    if not precision.fp8:
        return
    if precision.linear_layers == "local":
        yield f"{fp8} needs Transformer Engine's linears, got precision.linear_layers=local; set it to auto, or fp8 to []"
    if precision.params_dtype != "bf16":
        yield f"{fp8} needs precision.params_dtype=bf16, got {precision.params_dtype}; set that, or fp8 to []"
    for name, present in (("teacher", config.needs_teacher), ("fake_score", config.needs_fake_score)):
        if name in precision.fp8 and not present:
            yield f"{fp8} names the {name}, which no stage of this run uses; take it out"
    yield from _fp8_shapes(config, fp8)


def _fp8_shapes(config: RunConfig, fp8: str) -> Iterator[str]:
    """Rows and columns of every FP8 matrix; a rank's video tokens are padded to fit (PrecisionConfig.token_multiple)."""
    model, tp = config.model, config.parallel.tp
    if tp <= 0:
        return
    for name in ("hidden_size", "ffn_hidden_size"):
        size = getattr(model, name)
        if size % (FP8_ALIGNMENT * tp):
            yield (
                f"model.{name}={size} must divide by {FP8_ALIGNMENT}*parallel.tp = {FP8_ALIGNMENT * tp} for {fp8}; lower parallel.tp, or "
                "set fp8 to []"
            )
    if model.text_len % FP8_ALIGNMENT:
        yield (
            f"model.text_len={model.text_len} must divide by {FP8_ALIGNMENT} for {fp8}, because the network attends to every text "
            "position and none can be added; set fp8 to []"
        )
    if model.wan is not None and model.wan.image_dim is not None:
        yield f"{fp8} multiplies rows in multiples of {FP8_ALIGNMENT}, which the 257 CLIP tokens of image_dim are not; set fp8 to []"


def _networks(config: RunConfig) -> Iterator[str]:
    if config.needs_teacher and config.init.teacher is None:
        yield "init.teacher=null, but a stage distils; name a diffusers folder with config.json and safetensors"
    if config.needs_fake_score and config.fake_score_optimizer is None:
        yield "fake_score_optimizer=null, but a stage has a DMD weight; give it at least lr"
    low_noise, boundary = config.init.teacher_low_noise, config.distillation.expert_boundary
    if (low_noise is None) != (boundary is None):
        yield (
            f"init.teacher_low_noise={low_noise or 'null'} with distillation.expert_boundary={boundary or 'null'}; give both for a teacher "
            "of two networks, or none"
        )
    if low_noise is not None and config.init.teacher is None:
        yield "init.teacher=null with init.teacher_low_noise given; name the network of high noise as init.teacher"
    if boundary is not None and not 0 < boundary < 1:
        yield f"distillation.expert_boundary={boundary} must be between 0 and 1, an RF time; Wan2.2 A14B has 0.875 or 0.9"


def _distillation(config: RunConfig) -> Iterator[str]:
    distillation = config.distillation
    for name, times in (
        ("distillation.p_g", distillation.p_g),
        ("distillation.p_d", distillation.p_d),
        ("distillation.flow.times", distillation.flow.times),
    ):
        yield from _time_distribution(name, times)
    yield from _positive("distillation", distillation, "teacher_guidance max_rollout_steps fd_size")
    yield from _positive("distillation.dcm", distillation.dcm, "total_steps skip shift")
    dcm = distillation.dcm
    if dcm.skip > dcm.total_steps:
        yield f"distillation.dcm.skip={dcm.skip} must be at most distillation.dcm.total_steps={dcm.total_steps}"
    if not 0 <= distillation.flow.caption_dropout <= 1:
        yield f"distillation.flow.caption_dropout={distillation.flow.caption_dropout} must be between 0 and 1"
    fixed = distillation.fixed_rollout_times
    if fixed is not None:
        yield from _step_times("distillation.fixed_rollout_times", fixed, distillation.max_rollout_steps)


def _given_frames(config: RunConfig) -> Iterator[str]:
    given, takes = config.distillation.conditional_frames, config.model.conditional_frames
    if given and not takes:
        yield (
            f"distillation.conditional_frames={list(given)}, but the network takes none; set null, or conditional_frames in model.cosmos "
            "(Video2World) or model.wan (TI2V)"
        )
    if takes and not given:
        yield "distillation.conditional_frames is required with conditional_frames; e.g. [1, 2] (Video2World), [0, 1] (TI2V)"
    if given and not 0 <= min(given) <= max(given) < config.latent.frames:
        yield f"distillation.conditional_frames={list(given)} must hold numbers from 0 to {config.latent.frames - 1} (latent.frames - 1)"


def _time_distribution(name: str, times: TimeDistribution) -> Iterator[str]:
    belongs = {"lognormal": ("mean", "std"), "uniform_shift": ("shift",)}[times.kind]
    for field in ("mean", "std", "shift"):
        value = getattr(times, field)
        if field in belongs and value is None:
            yield f"{name}.{field} is required when {name}.kind={times.kind}; set it"
        elif field not in belongs and value is not None:
            yield f"{name}.{field}={value} has no meaning when {name}.kind={times.kind}; remove it"
        elif field != "mean" and value is not None and value <= 0:
            yield f"{name}.{field}={value} must be greater than 0"


def _step_times(name: str, times: tuple[float, ...], steps: int) -> Iterator[str]:
    if len(times) < steps - 1:
        yield f"{name}={list(times)}: got {len(times)} times, need at least {steps - 1} for {steps} steps; add some"
    decreasing = all(a > b for a, b in zip((math.pi / 2, *times), (*times, 0.0), strict=True))
    if not decreasing:
        yield f"{name}={list(times)} must fall from below pi/2 to above 0, e.g. [1.5, 1.4, 1.0]"


def _stage(stage: StageConfig, where: str) -> Iterator[str]:
    losses = stage.losses
    weights = {name: getattr(losses, name) for name in ("scm", "dmd", "dcm", "flow")}
    yield from (
        f"{where}.losses.{name}={weight} must not be negative" for name, weight in weights.items() if weight < 0
    )
    yield from (
        f"{where}.{name} must be greater than 0"
        for name in ("steps", "student_update_freq")
        if getattr(stage, name) < 1
    )
    if not any(weights.values()):
        yield f"{where}.losses are all 0; give scm, dmd, dcm or flow a weight"
    if losses.flow and (losses.scm or losses.dmd or losses.dcm):
        yield f"{where}.losses: flow={losses.flow} trains a teacher and needs a stage of its own; split this one"
    if losses.dmd and stage.student_update_freq == 1:
        yield f"{where}.student_update_freq=1 never trains the critic that DMD needs; set 2 or more (5 for Wan 1.3B)"
    if not losses.dmd and stage.student_update_freq != 1:
        yield f"{where}.student_update_freq={stage.student_update_freq} trains a critic for no DMD; set 1, or losses.dmd"
    if stage.tangent_warmup < 0 or (stage.tangent_warmup and not losses.scm):
        yield f"{where}.tangent_warmup={stage.tangent_warmup} needs an scm weight; set tangent_warmup to 0"
    if losses.dmd and not (losses.scm or losses.dcm) and stage.tangent_warmup:
        yield f"{where}.tangent_warmup={stage.tangent_warmup} would leave the student without a loss; set it to 0"
    for name in ("student_lr", "fake_score_lr"):
        value = getattr(stage, name)
        if value is not None and value < 0:
            yield f"{where}.{name}={value} must not be negative"


def _stage_list(stages: tuple[StageConfig, ...]) -> Iterator[str]:
    if not stages:
        yield "stages is empty; give at least one with name, steps and losses"
    names = [stage.name for stage in stages]
    for name in {name for name in names if names.count(name) > 1}:
        yield f"stages: the name {name!r} is used twice; names label metrics and checkpoints, make them differ"


def _optimizers(config: RunConfig) -> Iterator[str]:
    yield from _optimizer(config.student_optimizer, "student_optimizer")
    if config.fake_score_optimizer is not None:
        yield from _optimizer(config.fake_score_optimizer, "fake_score_optimizer")
    if not 0 < config.ema.relative_width < 0.28:
        yield f"ema.relative_width={config.ema.relative_width} must be between 0 and 0.28; 0.1 is usual"


def _optimizer(optimizer: OptimizerConfig, where: str) -> Iterator[str]:
    for name in ("lr", "weight_decay", "lr_warmup_steps", "clip_grad"):
        if getattr(optimizer, name) < 0:
            yield f"{where}.{name}={getattr(optimizer, name)} must not be negative"
    yield from _positive(where, optimizer, "eps")
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        yield f"{where}.betas={list(optimizer.betas)} must each be at least 0 and below 1"


def _encoders(config: RunConfig) -> Iterator[str]:
    encoders = config.encoders
    for field in ("video", "text", "image"):
        value = getattr(encoders, field)
        if value in ("wan_vae", "umt5", "t5", "clip") and encoders.folder is None:
            yield (
                f"encoders.folder=null, but encoders.{field}={value} reads it; name a local diffusers checkpoint with vae/, "
                "text_encoder/ and tokenizer/"
            )
    if encoders.image != "none" and (config.model.wan is None or config.model.wan.image_dim is None):
        yield f"encoders.image={encoders.image}, but the network attends to no image (model.wan.image_dim=null); set encoders.image to none"
    if encoders.text == "none" and encoders.negative_prompt is not None:
        yield (
            f"encoders.negative_prompt={encoders.negative_prompt!r} needs a text encoder, got encoders.text=none; remove it "
            "or set encoders.text"
        )
    drops = config.distillation.flow.caption_dropout > 0 and any(stage.losses.flow for stage in config.stages)
    own_null = config.data.negative_embedding is None and encoders.negative_prompt is None
    if encoders.text in ("umt5", "t5") and drops and own_null:
        yield (
            "encoders.negative_prompt=null is the release's negative prompt, but caption dropout of flow matching needs the empty "
            'caption; set encoders.negative_prompt to ""'
        )


def _data(config: RunConfig) -> Iterator[str]:
    yield from _positive("data", config.data, "num_threads prefetch")
    unconditional = config.needs_teacher and config.distillation.teacher_guidance > 1
    flow_drops = config.distillation.flow.caption_dropout > 0 and any(stage.losses.flow for stage in config.stages)
    if (unconditional or flow_drops) and config.data.negative_embedding is None and config.encoders.text == "none":
        yield (
            "data.negative_embedding=null with encoders.text=none: guidance and caption dropout need the embedding of "
            "the empty or negative caption; name its file"
        )


def _counts(config: RunConfig) -> Iterator[str]:
    yield from _positive("trainer", config.trainer, "log_every checkpoint_every keep_checkpoints")
    every, kept = config.trainer.checkpoint_every, config.trainer.keep_every
    if kept < 0 or (every > 0 and kept % every):
        yield (
            f"trainer.keep_every={kept} must be a multiple of trainer.checkpoint_every={every}, or no such checkpoint is ever "
            "written; 0 keeps none"
        )
    if config.trainer.sample_every < 0:
        yield f"trainer.sample_every={config.trainer.sample_every} must not be negative; 0 takes no samples"
    if config.trainer.hang_timeout is not None and config.trainer.hang_timeout <= 0:
        yield f"trainer.hang_timeout={config.trainer.hang_timeout} must be greater than 0, or null to wait for ever"
    if config.trainer.stop_after is not None and config.trainer.stop_after < 1:
        yield f"trainer.stop_after={config.trainer.stop_after} must be at least 1, or null"


def _sampling(config: RunConfig) -> Iterator[str]:
    sampling = config.sampling
    yield from _positive("sampling", sampling, "sigma_max teacher_steps teacher_shift guidance num_samples fps")
    if not sampling.student_steps or min(sampling.student_steps) < 1:
        yield f"sampling.student_steps={list(sampling.student_steps)} must hold at least one count, each 1 or more"
    else:
        yield from _step_times("sampling.student_times", sampling.student_times, max(sampling.student_steps))


def _logging(config: RunConfig) -> Iterator[str]:
    peak = config.logging.peak_tflops
    if peak is not None and peak <= 0:
        yield f"logging.peak_tflops={peak} must be greater than 0, or null for the GPU's own"
