"""Networks, their latents and their weights against what the stages ask of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from difflib import get_close_matches

from rcm_megatron.config.advice import multiples_near
from rcm_megatron.config.declare import Change, Problem
from rcm_megatron.config.model import AXES, ModelConfig
from rcm_megatron.config.roles import first_of, known_roles
from rcm_megatron.config.run import RunConfig
from rcm_megatron.registries import OBJECTIVES, family_of, settings_of


def present_roles(config: RunConfig) -> Iterator[str]:
    """The networks that the stages need, as far as they are given."""
    return (role for role in config.roles if role in config.networks)


def models_of(config: RunConfig) -> Iterator[tuple[str, ModelConfig]]:
    """Path and architecture of each different network."""
    paths = dict.fromkeys(["model", *(config.model_path(role) for role in present_roles(config))])
    for path in paths:
        yield path, config.model if path == "model" else config.model_of(path.split(".")[1])


def _second_time(config: RunConfig) -> Iterator[str | Problem]:
    """Networks of two times exactly where objectives train them, and where samples are made."""
    for path, model in models_of(config):
        if model.second_time and not family_of(model).second_time:
            yield f"{path}.second_time=true, but {family_of(model).title} has none; set it to false"
    for index, stage in enumerate(config.stages):
        names = [*stage.losses, *(name for loss in stage.losses for name in OBJECTIVES[loss].companions)]
        for name in dict.fromkeys(names):
            yield from _second_time_of(config, name, f"stages.{index} ({stage.name})")
    followed = (
        ("distillation.rollout", config.distillation.rollout),
        ("sampling.student_sampler", config.sampling.student_sampler),
    )
    student = "student" in config.networks and config.model_of("student").second_time
    for path, value in followed:
        if value == "flow_map" and not student:
            yield Problem(
                f"{path}=flow_map follows a student of two times, got networks.student.model.second_time=false",
                (Change(path, ("renoise",)),),
            )


def _second_time_of(config: RunConfig, name: str, stage: str) -> Iterator[str | Problem]:
    """What an objective asks of the networks that it trains."""
    objective = OBJECTIVES[name]
    for role in (role for role in config.trained_roles if first_of(role) == objective.trains):
        if role not in config.networks or objective.second_time == "follows":
            continue
        has, path = config.model_of(role).second_time, f"networks.{role}.model.second_time"
        if has and objective.second_time == "refuses":
            having = ", ".join(other for other in OBJECTIVES if OBJECTIVES[other].second_time == "needs")
            yield (
                f"{path}=true, but {name} of {stage} trains a network of one time; set networks.{role}.model: "
                f"{{second_time: false}}, or train it with {having}"
            )
        if not has and objective.second_time == "needs":
            yield f"{path}=false, but {name} of {stage} trains a flow map of two times; set networks.{role}.model: {{second_time: true}}"


def _channels(config: RunConfig) -> Iterator[Problem]:
    channels, of_network = config.latent.channels, config.model.in_channels
    if channels != of_network:
        yield Problem(
            f"latent.channels={channels} must equal model.in_channels={of_network}",
            (Change("latent.channels", (of_network,)),),
            "set both alike",
        )


def _inputs(config: RunConfig) -> Iterator[Problem]:
    """All networks see the same latents, texts and images, whatever their sizes."""
    need = config.model.inputs
    for role in present_roles(config):
        path, got = config.model_path(role), config.model_of(role).inputs
        for name in need:
            if got[name] != need[name]:
                yield Problem(
                    f"{path}.{name}={_plain(got[name])} must equal model.{name}={_plain(need[name])}: all networks of a run see the same "
                    "latents, texts and images",
                    (Change(f"{path}.{name}", (need[name],)),),
                    f"set {path}.{name} to {_plain(need[name])}",
                )


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else "null" if value is None else value


def _patches(config: RunConfig) -> Iterator[Problem]:
    sizes, patches = config.latent.shape_CTHW[1:], config.model.patch_size
    for axis, size, patch in zip(AXES, sizes, patches, strict=True):
        if size % patch:
            yield Problem(
                f"latent.{axis}={size} must divide by {patch} (model.patch_size={list(patches)})",
                (Change(f"latent.{axis}", multiples_near(size, patch), most=2),),
            )


def _positions(config: RunConfig) -> Iterator[Problem]:
    latent = config.latent
    for path, model in models_of(config):
        for axis, size, patch in zip(AXES, latent.shape_CTHW[1:], model.patch_size, strict=True):
            if size // patch > model.rope_max_seq_len:
                yield Problem(
                    f"latent.{axis}={size} makes {size // patch} tokens on an axis, more than "
                    f"{path}.rope_max_seq_len={model.rope_max_seq_len}",
                    (
                        Change(f"{path}.rope_max_seq_len", (max(latent.shape_CTHW[1:]),)),
                        Change(f"latent.{axis}", (model.rope_max_seq_len * patch,)),
                    ),
                )


def _family(config: RunConfig) -> Iterator[Problem | str]:
    for path, model in models_of(config):
        yield from family_of(model).problems(model, config.latent, path=path)


def _stage_list(config: RunConfig) -> Iterator[str]:
    """A run has stages, told apart by name."""
    if not config.stages:
        yield "stages: got [], need at least one with name, steps and losses"
    names = [stage.name for stage in config.stages]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"stages: the name {name!r} is used twice; names label metrics and checkpoints, make them differ"


def _objectives(config: RunConfig) -> Iterator[str]:
    """What each objective of a stage asks for by itself."""
    for index, stage in enumerate(config.stages):
        for name in stage.losses:
            settings = settings_of(name, config.objectives)
            yield from OBJECTIVES[name].check(config, settings, stage, f"stages.{index} ({stage.name})")


def _roles(config: RunConfig) -> Iterator[str | Problem]:
    """What the stages ask of the networks: that they are there, trained or as they were."""
    for role in config.roles:
        trained, network = role in config.trained_roles, config.networks.get(role)
        use = "trains it" if trained else "needs it"
        if network is None:
            fix = "optimizer: {lr: ...}" if trained else "init: a checkpoint"
            yield f"networks.{role}: got nothing, but a stage {use}; add it, with at least {fix}"
        elif trained and network.optimizer is None:
            yield f"networks.{role}.optimizer=null, but a stage trains it; give it at least lr"
        elif trained and network.weights == "offloaded" and network.lora is None:
            yield Problem(
                f"networks.{role}.weights=offloaded, but a stage trains it, need resident or sharded, or a LoRA",
                (Change(f"networks.{role}.weights", ("sharded", "resident")),),
            )
        elif not trained and config.init_of(role) is None:
            yield f"networks.{role}.init=null, but a stage needs it as it was trained before; name a checkpoint, e.g. a diffusers folder"


def _unknown_roles(config: RunConfig) -> Iterator[str]:
    known = known_roles()
    for role in config.networks:
        if role not in known:
            near = get_close_matches(role, known, n=1)
            fix = f"did you mean networks.{near[0]}?" if near else "take it out"
            yield f"networks.{role}: no objective has such a network, need one of {', '.join(known)}; {fix}"


def _starts(config: RunConfig) -> Iterator[Problem]:
    """A network without a checkpoint of its own starts as the teacher, and so must be like it."""
    if "teacher" not in config.networks or config.init_of("teacher") is None:
        return
    teacher, teacher_path = config.model_of("teacher"), config.model_path("teacher")
    for role in present_roles(config):
        model, path = config.model_of(role), config.model_path(role)
        if role in config.trained_roles:
            # what a second time adds starts by itself
            model = replace(model, second_time=model.second_time and teacher.second_time)
        if config.networks[role].init is not None or model == teacher:
            continue
        name = next(f.name for f in fields(model) if getattr(model, f.name) != getattr(teacher, f.name))
        alike = [n.init for other, n in config.networks.items() if n.init and config.model_of(other) == model]
        yield Problem(
            f"networks.{role}.init=null starts as the teacher, but {path}.{name}={_plain(getattr(model, name))} and "
            f"{teacher_path}.{name}={_plain(getattr(teacher, name))}",
            (Change(f"networks.{role}.init", alike),),
            f"name a checkpoint of this architecture as networks.{role}.init",
        )


def _loras(config: RunConfig) -> Iterator[str]:
    """A LoRA's targets are linears, some of them in blocks, so that every piece of a pipeline has something to train."""
    for role in present_roles(config):
        lora, linears = config.networks[role].lora, family_of(config.model_of(role)).flop_rows
        if lora is None:
            continue
        for target in lora.targets:
            if not any(f"{name}.".startswith(f"{target}.") or f"{target}.".startswith(f"{name}.") for name in linears):
                yield f"networks.{role}.lora.targets: no linear begins with {target!r}, need some of {', '.join(linears)}; take it out"
        if config.parallel.pp > 1 and not any(target.split(".")[0] in _IN_BLOCKS for target in lora.targets):
            yield (
                f"networks.{role}.lora.targets={list(lora.targets)} are in no block, need one of {', '.join(_IN_BLOCKS)} with "
                f"parallel.pp={config.parallel.pp}; add one, or set parallel.pp to 1"
            )


_IN_BLOCKS = ("self_attn", "cross_attn", "mlp")


def _experts(config: RunConfig) -> Iterator[str]:
    """What is two networks has a boundary between them, and every one of them something to do."""
    second = [role for role in config.networks if first_of(role) != role]
    boundary = config.distillation.expert_boundary
    if second and boundary is None:
        yield f"distillation.expert_boundary=null, but networks.{second[0]} is given; give both for a role of two networks, or none"
    if boundary is not None and not second:
        yield (
            f"distillation.expert_boundary={boundary}, but networks.teacher_low_noise is not given; give both for a teacher of two "
            "networks, or none"
        )
    for index, stage in enumerate(config.stages):
        for role in stage.lr:
            if first_of(role) != role and role not in config.networks:
                yield f"stages.{index} ({stage.name}).lr.{role}: the run has no networks.{role}; take it out"
    for role in second:
        if (first := first_of(role)) not in config.networks:
            yield f"networks.{role}: got it without networks.{first}, need both; add the network of high noise"
        elif (config.networks[first].ema is None) != (config.networks[role].ema is None):
            yield f"networks.{role}.ema and networks.{first}.ema: got one, need both or none; they are sampled together"
    if "teacher_low_noise" in config.networks and config.networks["teacher_low_noise"].init is None:
        yield "networks.teacher_low_noise.init=null; name the network of low noise, as networks.teacher.init names that of high noise"


def _conditional_frames(config: RunConfig) -> Iterator[str]:
    given, takes = config.distillation.conditional_frames, config.model.conditional_frames
    if given and not takes:
        yield (
            f"distillation.conditional_frames={list(given)}, but the network takes none; set null, or model.conditional_frames "
            "to true (Video2World, TI2V)"
        )
    if takes and not given:
        yield "distillation.conditional_frames is required with conditional_frames; e.g. [1, 2] (Video2World), [0, 1] (TI2V)"
    if given and max(given) >= config.latent.frames:
        yield f"distillation.conditional_frames={list(given)} must hold numbers from 0 to {config.latent.frames - 1} (latent.frames - 1)"


NETWORK_RULES = (
    _stage_list,
    _objectives,
    _second_time,
    _channels,
    _inputs,
    _patches,
    _positions,
    _family,
    _roles,
    _unknown_roles,
    _starts,
    _loras,
    _experts,
    _conditional_frames,
)
