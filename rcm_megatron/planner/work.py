"""What a rank computes and sends in an update, by formula: equal to the counts of a dry run (tests/dryrun/test_agreement.py).

One pass of one sample through one network is taken apart first; an update is the passes that its objectives say they make.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from rcm_megatron.config import ParallelConfig, RunConfig
from rcm_megatron.objectives import plan
from rcm_megatron.objectives.base import Pass
from rcm_megatron.objectives.plan import Step
from rcm_megatron.planner.inventory import Inventory, Weight
from rcm_megatron.planner.shapes import Inventories, Shapes, held_of

Kind = Literal["forward", "dual", "backward", "dual backward"]
"""Of a pass: plain; output and tangent at once; the gradient of a plain pass, and of a dual one's primal, with what is computed again."""
LINEAR, ATTENTION, ATTENTION_BACKWARD, ATTENTION_JVP = "linear", "attention", "attention backward", "attention jvp"
OPERATIONS = (LINEAR, ATTENTION, ATTENTION_BACKWARD, ATTENTION_JVP)
FLATS = 2
"""Messages of a block's weights, or of its gradients: of the parameters of each dtype."""
FLASH_BACKWARD = 2.5
"""FLOPs of flash attention's backward, of its forward: five products for two."""


@dataclass
class Work:
    """Of one rank."""

    flops: Counter[str] = field(default_factory=Counter)
    """By `OPERATIONS`."""
    sent: Counter[str] = field(default_factory=Counter)
    """Group -> bytes that the rank sends, by ring algorithms; `weights`: what dp_cp gathers of sharded networks."""
    calls: Counter[str] = field(default_factory=Counter)
    """Group -> messages."""
    touched: float = 0.0
    """Bytes of activations that kernels without matrix products read and write: an estimate."""
    launches: float = 0.0
    """Kernels, about."""

    def add(self, other: Work, times: float = 1, *, calls: float | None = None) -> None:
        """Take ``other`` in, so many times; in ``calls`` calls where several samples share one."""
        calls = times if calls is None else calls
        for name, factor in (("flops", times), ("sent", times), ("calls", calls)):
            for key, value in getattr(other, name).items():
                getattr(self, name)[key] += value * factor
        self.touched += other.touched * times
        self.launches += other.launches * calls

    def message(self, group: str, size: float, *, ranks: int, calls: int = 1, rounds: int = 1) -> None:
        """``calls`` all-gathers, reduce-scatters or all-to-alls of ``size`` bytes together; two ``rounds`` are an all-reduce."""
        if ranks > 1:
            self.sent[group] += rounds * size * (ranks - 1) / ranks
            self.calls[group] += calls


def passes_of(run: RunConfig, step: Step) -> Iterator[tuple[str, Kind, int]]:
    """(Role, kind of pass, how often a sample goes through it) of all that ``step`` executes."""
    for p in _passes(run, step):
        kinds: dict[Kind, int] = {"forward": p.forward + p.again, "dual": p.dual}
        kinds["dual backward" if p.dual else "backward"] = p.backward
        yield from ((p.role, kind, times) for kind, times in kinds.items() if times)


class NetworkWork:
    """Passes of one sample through the pieces of one network on one pipeline stage."""

    def __init__(self, shapes: Shapes, role: str, inventory: Inventory, *, stage: int) -> None:
        self.shapes, self.inventory, self.stage = shapes, inventory, stage
        self.model, self.parallel = shapes.run.model_of(role), shapes.parallel
        self.blocks, self.rows = shapes.blocks(role, stage), shapes.rows(role)
        pieces = shapes.pieces(stage)
        self.times = {
            "block": self.blocks,
            "first": int(0 in pieces),
            "last": int(self.parallel.num_chunks - 1 in pieces),
            "every": len(pieces),
        }
        self.hidden = shapes.local_tokens * self.model.hidden_size * shapes.width
        """Bytes of the hidden state on a rank."""

    # ---- matrix products

    def linears(self, kinds: tuple[str, ...], *, outside: bool = True) -> float:
        """FLOPs of a forward through the linears of what they work on, ``outside`` of the blocks too."""
        places = ("block", "first", "last", "every") if outside else ("block",)
        return sum(
            self._linear(w) * self.times[w.place] for w in self.inventory if w.rows in kinds and w.place in places
        )

    def _linear(self, weight: Weight) -> float:
        """Tokens are cut over tp where a linear is not, text and times are not."""
        tp = self.parallel.tp
        cut = weight.elements / tp if weight.rows == "tokens" else weight.on(tp)
        return 2.0 * self.rows[weight.rows] * cut

    def attention(self) -> tuple[float, float]:
        """FLOPs of a forward's self and cross attention."""
        one = 4.0 * self.shapes.context_tokens * self.model.hidden_size / self.parallel.tp * self.blocks
        return one * self.shapes.tokens, one * (self.rows["text"] + self.rows["image"])

    def _backward_linears(self) -> float:
        """Gradients of both factors; what works on given inputs needs one alone."""
        given = ("patch_embedding.weight", "text_embedding.linear_1.weight", "time_embedding.linear_1.weight")
        given += ("interval_embedding.linear_1.weight",)
        saved = sum(self._linear(w) * self.times[w.place] for w in self.inventory if w.name in given)
        return 2 * self.linears(("tokens", "text", "image", "times")) - saved

    def _again(self, *, whole: bool) -> tuple[float, float]:
        """Linears and attention that a backward computes a second time: blocks and what embeds times and patches, never text's embedder;
        self-attention under `full` alone."""
        embedders = self.linears(("tokens", "times")) - self.linears(("tokens", "times"), outside=False)
        if not whole:
            return embedders, 0.0
        own, cross = self.attention()
        policy = self.shapes.run.memory.recompute
        return embedders + self.linears(tuple(self.rows), outside=False), cross + (own if policy == "full" else 0.0)

    # ---- messages

    def _tensor_parallel(self, work: Work, *, gathers: int, scatters: int, streams: int, passes: int) -> None:
        """Three gathers and three scatters of the hidden state a block, sums of the squares of q and k, gathers of what modulates."""
        tp, whole = self.parallel.tp, self.hidden * self.parallel.tp * streams
        for count in (gathers, scatters):
            work.message("tp", count * self.blocks * whole, ranks=tp, calls=count * self.blocks)
        modulation = sum(
            4.0 * self.rows["times"] * w.shape[0] * self.times[w.place]
            for w in self.inventory
            if w.is_split and w.rows == "times"
        )
        calls = sum(self.times[w.place] for w in self.inventory if w.is_split and w.rows == "times")
        work.message("tp", modulation * streams * passes, ranks=tp, calls=calls * passes)
        own = self.shapes.context_tokens
        squares = {"self_attn": (own, own), "cross_attn": (own, self.rows["text"])}
        for module, (of_q, of_k) in squares.items():
            if any(w.name == f"{module}.q_norm.weight" and w.is_split for w in self.inventory):
                tangents = streams if module == "self_attn" else 1
                size = 4.0 * (of_q * streams + of_k * tangents) * scatters // 3
                work.message("tp", size * self.blocks, ranks=tp, calls=2 * scatters // 3 * self.blocks, rounds=2)

    def _context_parallel(
        self, work: Work, *, streams: int, ring_units: float, rounds: int = 1, passes: int = 1
    ) -> None:
        """q, k, v and the output by all-to-all in each of `passes`; keys and values, in units of the hidden state, `rounds` times round the
        ring."""
        ring, ulysses = self.parallel.ring, self.parallel.ulysses
        size = 4 * streams * passes * self.hidden * self.blocks
        work.message("ulysses", size, ranks=ulysses, calls=2 * passes * self.blocks)
        if ring > 1:
            work.sent["ring"] += ring_units * self.hidden * self.blocks * (ring - 1)
            work.calls["ring"] += (ring - 1) * self.blocks * rounds

    def _stages(self, work: Work, *, streams: int, end: int | None = None) -> None:
        """The hidden state to the next piece, or its gradient to the one before; ``end``: the piece that sends none."""
        end = self.parallel.num_chunks - 1 if end is None else end
        messages = sum(piece != end for piece in self.shapes.pieces(self.stage))
        work.sent["pp"] += messages * streams * self.hidden
        work.calls["pp"] += messages

    # ---- passes

    def of(self, kind: Kind) -> Work:
        """One pass of one sample."""
        work, (own, cross) = Work(), self.attention()
        if kind == "forward":
            work.flops[LINEAR] = self.linears(tuple(self.rows))
            work.flops[ATTENTION] = own + cross
            self._tensor_parallel(work, gathers=3, scatters=3, streams=1, passes=1)
            self._context_parallel(work, streams=1, ring_units=2)
            self._stages(work, streams=1)
        elif kind == "dual":
            work.flops[LINEAR] = 2 * self.linears(("tokens", "times")) + self.linears(("text", "image"))
            work.flops[ATTENTION_JVP] = 3 * own + 2 * cross
            self._tensor_parallel(work, gathers=3, scatters=3, streams=2, passes=1)
            self._context_parallel(work, streams=2, ring_units=4)
            self._stages(work, streams=2)
        else:
            self._backward(work, dual=kind == "dual backward")
        touched, launches = KERNELS[kind]
        work.touched, work.launches = touched * self.hidden * self.blocks, launches * self.blocks
        return work

    def _backward(self, work: Work, *, dual: bool) -> None:
        own, cross = self.attention()
        policy = self.shapes.run.memory.recompute
        whole = dual or policy in ("attention", "full")
        linears, attention = self._again(whole=whole)
        work.flops[LINEAR] = linears + self._backward_linears()
        work.flops[ATTENTION] = attention
        work.flops[ATTENTION_BACKWARD] = FLASH_BACKWARD * (own + cross)
        self._tensor_parallel(work, gathers=9 if whole else 6, scatters=6 if whole else 3, streams=1, passes=2)
        gradients = 2 * 4 / self.shapes.width  # of k and v, in fp32
        rounds, passes = (3 if policy == "full" else 2), (2 if whole or policy == "selective" else 1)
        units = 2 * (rounds - 1) + gradients
        self._context_parallel(work, streams=1, ring_units=units, rounds=rounds, passes=passes)
        for w in self.inventory:
            if w.is_split and w.rows in ("text", "image"):  # the gradient of what every rank's part reads
                size = self.rows[w.rows] * w.shape[1] * self.shapes.width
                work.message(
                    "tp", size * self.times[w.place], ranks=self.parallel.tp, calls=self.times[w.place], rounds=2
                )
        self._stages(work, streams=2 if dual else 1, end=0)


KERNELS: Mapping[Kind, tuple[int, int]] = {
    "forward": (40, 37),
    "dual": (80, 48),
    "backward": (120, 120),
    "dual backward": (120, 120),
}
"""Of a block's pass: how often kernels of norms, modulation, gates, GELU and RoPE read or write a hidden state (from their arguments,
about), and how many kernels are launched (dry runs of Wan2.1)."""


class StageWork:
    """Of a rank of one pipeline stage. What a pass of one sample does is worked out once, whatever the step."""

    def __init__(self, shapes: Shapes, inventories: Inventories, *, stage: int) -> None:
        self.shapes, self.inventories, self.stage = shapes, inventories, stage
        self.held = held_of(shapes, inventories, stage=stage)
        self._networks: dict[str, NetworkWork] = {}
        alike: dict[tuple[int, ParallelConfig], NetworkWork] = {}
        for role in shapes.run.roles:
            inventory, parallel = inventories[role], shapes.run.parallel_of(role)
            network = alike.setdefault((id(inventory), parallel), NetworkWork(shapes, role, inventory, stage=stage))
            self._networks[role] = network
        self._known: dict[tuple[NetworkWork, Kind], Work] = {}
        self._reductions: dict[tuple[str, int], Work] = {}

    def one(self, role: str, kind: Kind) -> Work:
        """One pass of one sample."""
        network = self._networks[role]
        if (network, kind) not in self._known:
            self._known[network, kind] = network.of(kind)
        return self._known[network, kind]

    def passes(self, step: Step) -> Mapping[tuple[str, Kind], Work]:
        """What each (role, kind of pass) does for all samples of an update."""
        found: dict[tuple[str, Kind], Work] = {}
        for role, kind, times in passes_of(self.shapes.run, step):
            found.setdefault((role, kind), Work()).add(self.all_samples(role, kind), times)
        return found

    def all_samples(self, role: str, kind: Kind) -> Work:
        """One pass of all samples of an update."""
        work, shapes = Work(), self.shapes
        work.add(self.one(role, kind), shapes.samples, calls=shapes.micro_batches / _branches(shapes, role))
        return work

    def once(self, step: Step) -> Work:
        """What passes do not send by themselves: gradients summed over ranks (of a network in pieces after each micro-batch), weights
        gathered after the update, and those of sharded networks for each pass."""
        work, shapes, times = Work(), self.shapes, 1
        if shapes.in_pieces(step.trained):
            times = shapes.micro_batches * sum(p.backward for p in _passes(shapes.run, step))
        work.add(self._reduction(step.trained, times))
        for name in filter(shapes.is_gathered, shapes.run.roles):
            gathers = gathers_of(shapes, name, step)
            calls = gathers * FLATS * (shapes.blocks(name, self.stage) + 1)
            work.message("weights", self.held[name].bytes * gathers, ranks=shapes.shards, calls=calls)
        return work

    def _reduction(self, role: str, times: int) -> Work:
        """Gradients of a network summed over ranks, `times` an update where it is in pieces; else its weights gathered too."""
        if (role, times) in self._reductions:
            return self._reductions[role, times]
        work, shapes = Work(), self.shapes
        held, network, tp, pp = self.held[role], self._networks[role], shapes.parallel.tp, shapes.parallel.pp
        pieces = shapes.shards if shapes.in_pieces(role) else 1
        if pieces > 1:
            calls = times * FLATS * (shapes.blocks(role, self.stage) + 1)
            work.message("dp_cp", 4 * held.elements * times, ranks=shapes.shards, calls=calls)
        else:
            work.message("dp_cp", 4 * held.elements + held.bytes, ranks=shapes.shards, calls=4)
        of_text = {w.module for w in network.inventory if w.place == "every" and w.rows in ("text", "image")}
        # gradients of what embeds texts are equal on all ranks already
        partial = [w for w in network.inventory if not w.is_split and w.module not in of_text]
        replicated = [w for w in network.inventory if w.place == "every"]
        work.message("tp", 4 * sum(w.elements * network.times[w.place] for w in partial) / pieces, ranks=tp, rounds=2)
        work.message("pp", 4 * sum(w.on(tp) for w in replicated) / pieces, ranks=pp, rounds=2)
        self._reductions[role, times] = work
        return work


def gathers_of(shapes: Shapes, role: str, step: Step) -> int:
    """How often an update gathers the weights of a network that is sharded: once a pass of a micro-batch, and once its backward."""
    own = [p for p in _passes(shapes.run, step) if p.role == role]
    evaluations = sum(p.forward + p.again + p.dual + p.backward for p in own)
    return shapes.micro_batches * evaluations // _branches(shapes, role)


def _branches(shapes: Shapes, role: str) -> int:
    """Samples of one evaluation of a sample: a frozen network is asked with and without the caption at once."""
    return 2 if role in shapes.frozen_roles and shapes.run.distillation.teacher_guidance > 1 else 1


def _passes(run: RunConfig, step: Step) -> Iterator[Pass]:
    return plan.passes_of(step, distillation=run.distillation, objectives=run.objectives)
