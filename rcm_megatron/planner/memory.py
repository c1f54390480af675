"""Bytes of tensors on the fullest rank, by formula: what stands from step to step, and what a pass holds beside it.

What stands is arithmetic and exact. What a block's pass holds at its fullest moment are counts of tensors, in hidden states: the gathered
one of a tensor-parallel group (H), this rank's (l), its part of the feed-forward layer (F). They were read off dry runs of Wan2.1 14B at
480p on ten layouts and policies; tests/dryrun/test_planner.py holds how far they are off elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rcm_megatron.dryrun.command import fullest_stages
from rcm_megatron.planner.shapes import Inventories, Shapes, held_of
from rcm_megatron.training.footprint import Held, standing_bytes

GIB = 2**30


@dataclass(frozen=True)
class Peak:
    """Of the fullest moment of a step on a rank."""

    standing: Mapping[str, int]
    """Between steps, by what it is."""
    working: int
    """Beside that: activations, messages, what a pass makes and drops."""
    phase: str
    stage: int

    @property
    def total(self) -> int:
        return sum(self.standing.values()) + self.working


@dataclass(frozen=True)
class _Units:
    """Bytes of one micro-batch: what everything here is counted in."""

    gathered: int
    """H; 0 without tensor parallelism."""
    local: int
    feed_forward: int

    def of(self, gathered: float, local: float, feed_forward: float = 0.0) -> int:
        return round(gathered * self.gathered + local * self.local + feed_forward * self.feed_forward)


FORWARD = ((0, 15.2, 0), (1, 8.5, 1))
"""(H, l, F) at the fullest moments of a plain forward without a graph, one in attention and one in the feed-forward layer."""
DUAL = ((0, 30, 0), (2, 18, 2))
BACKWARD = ((1, 16, 5),)
"""Of one block that is computed again and differentiated."""
RING, ULYSSES = 5.7, 1.6
"""l more in a backward: buffers of blocks on their way and of their gradients; of all-to-alls."""
ATTENTION = 1.02
"""l of what self-attention puts out: its output, and a log-sum-exp for 128 channels."""
KEPT = {"full": (0, 1, 0), "attention": (0, 1 + ATTENTION, 0), "selective": (0, 10.3, 1), "none": (0, 19.3, 2)}
"""Of a block, what a plain forward keeps for its backward."""
BESIDE_KEPT = {"full": BACKWARD, "attention": BACKWARD, "selective": ((1, 6.3, 0),), "none": ((0, 3.3, 0),)}
"""What the backward of a block holds beside what was kept of all."""


def peaks_of(shapes: Shapes, inventories: Inventories) -> Iterator[Peak]:
    """Of each pipeline stage that may be the fullest: the first, the last, and those with more blocks than the first."""
    for stage in fullest_stages(shapes.run):
        yield peak_on(shapes, inventories, stage=stage)


def peak_of(shapes: Shapes, inventories: Inventories) -> Peak:
    """Of the fullest stage."""
    return max(peaks_of(shapes, inventories), key=lambda peak: peak.total)


def peak_on(shapes: Shapes, inventories: Inventories, *, stage: int) -> Peak:
    """Of a rank of ``stage``."""
    held = held_of(shapes, inventories, stage=stage)
    standing = standing_bytes(shapes.run, held, shards=shapes.shards)
    blocks = {role: inventories[role].held("block", tp=shapes.parallel.tp) for role in shapes.run.roles}
    phases = dict(_phases(shapes, held, blocks, stage))
    phase = max(phases, key=phases.__getitem__)
    return Peak(standing=standing, working=phases[phase], phase=phase, stage=stage)


def _phases(
    shapes: Shapes, held: Mapping[str, Held], block: Mapping[str, Held], stage: int
) -> Iterator[tuple[str, int]]:
    """(Phase, what it holds beside the standing bytes)."""
    run = shapes.run
    branches = 2 if run.distillation.teacher_guidance > 1 else 1
    given = _given(shapes) + max(branches, 2 if run.tangent_roles else 1) * _units(shapes, "student").gathered
    for role in run.roles:
        units, blocks = _units(shapes, role), shapes.blocks(role, stage)
        if role not in run.trained_roles:
            gathered = 0 if run.networks[role].weights == "resident" else _two_blocks(held[role], blocks)
            yield role, given + branches * _fullest(units, FORWARD) + gathered
            continue
        in_flight = _in_flight(shapes, stage) * blocks
        whole, with_gradient = _gathered(shapes, role, held[role], block[role], blocks)
        buffers, policy = _context(shapes, units) + _largest_gradient(shapes, role), run.memory.recompute
        buffers += with_gradient
        sent = _sent_in_flight(shapes, stage) * units.local
        if role in run.tangent_roles:
            kept = in_flight * units.of(*KEPT["full" if policy == "full" else "attention"]) + 2 * sent
            yield "dual", round(given + kept + _fullest(units, DUAL) + whole)
            yield "backward of a dual", round(given + kept + _fullest(units, BACKWARD) + buffers)
        kept = in_flight * units.of(*KEPT[policy]) + sent
        if policy in ("attention", "full"):
            yield role, round(given + kept + _fullest(units, FORWARD) + whole)
        yield "backward", round(given + kept + _fullest(units, BESIDE_KEPT[policy]) + buffers)
        if run.networks[role].offload_optimizer:
            yield "optimizer", given + held[role].optimizer_bytes(run.networks[role]) // shapes.shards


def _units(shapes: Shapes, role: str) -> _Units:
    model, parallel = shapes.run.model_of(role), shapes.parallel
    tokens = shapes.local_tokens * shapes.run.trainer.micro_batch_size * shapes.width
    return _Units(
        gathered=tokens * model.hidden_size * parallel.tp if parallel.tp > 1 else 0,
        local=tokens * model.hidden_size,
        feed_forward=tokens * model.ffn_hidden_size,
    )


def _fullest(units: _Units, moments: tuple[tuple[float, float, float], ...]) -> int:
    return max(units.of(*moment) for moment in moments)


def _context(shapes: Shapes, units: _Units) -> int:
    parallel = shapes.parallel
    return units.of(0, (RING if parallel.ring > 1 else 0) + (ULYSSES if parallel.ulysses > 1 else 0))


def _largest_gradient(shapes: Shapes, role: str) -> int:
    """Of a linear's weight, before it is added to the main gradient."""
    model = shapes.run.model_of(role)
    return model.hidden_size * model.ffn_hidden_size * shapes.width // shapes.parallel.tp


def _two_blocks(held: Held, blocks: int) -> int:
    """Of sharded weights: the block that computes, and the next that is gathered beside it."""
    return 2 * held.bytes // max(1, blocks)


def _gathered(shapes: Shapes, role: str, held: Held, block: Held, blocks: int) -> tuple[int, int]:
    """Of a network in pieces, in a forward and in a backward: what is outside of the blocks, the block that computes and the next; in a
    backward their fp32 gradients, those of the block before on their way."""
    if not shapes.in_pieces(role):
        return 0, 0
    several = min(2, blocks)
    outside_bytes, outside_elements = held.bytes - blocks * block.bytes, held.elements - blocks * block.elements
    weights = outside_bytes + several * block.bytes
    return weights, weights + 4 * (outside_elements + several * block.elements + block.elements // shapes.shards)


def _in_flight(shapes: Shapes, stage: int) -> float:
    """Micro-batches whose block inputs a stage keeps: of 1F1B as many as stages follow; interleaved a fill of chunks more."""
    pp, vpp, count = shapes.parallel.pp, shapes.parallel.vpp, shapes.micro_batches
    if vpp == 1:
        return min(count, pp - stage)
    return min(count * vpp, 2 * (pp - stage - 1) + (vpp - 1) * pp + 1) / vpp


def _sent_in_flight(shapes: Shapes, stage: int) -> float:
    """Hidden states that a stage has sent and keeps: those of interleaved chunks, whose sends go on beside the next; and what arrives."""
    if shapes.parallel.vpp == 1:
        return 0
    return _in_flight(shapes, stage) * shapes.parallel.vpp + 2.5


def _given(shapes: Shapes) -> int:
    """Samples, noise and targets of all micro-batches (52 bytes an element), texts and rotations. `_phases` adds Megatron's one buffer for
    what tensor parallelism gathers, of the largest batch: both branches of the guidance, or a dual's halves."""
    run = shapes.run
    tokens = 52 * shapes.local_tokens * run.latent.channels * run.model.patch_volume * shapes.samples
    texts = 4 * run.model.text_len * run.model.text_dim * shapes.samples
    return tokens + texts + 16 * shapes.local_tokens * run.model.head_dim
