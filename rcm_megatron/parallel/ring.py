"""Ring attention (arXiv 2310.01889): blocks of keys and values go round the ranks, each of which merges what it finds in them.

The next block travels while this one is computed on: its hop is started before this block's compute, on CUDA on a stream of its own,
into the other one of two buffers. The backward is primal only: blocks of k and v go round again, each followed by its gradient, which
makes one more hop, home.

All tensors are [s, b, n, d]: tokens of this rank, batch, heads of this rank, head dim; `valid_tokens` counts the tokens of all ranks
that are no padding.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from rcm_kernels.flash_attention import attention_backward, attention_forward
from rcm_kernels.flash_attention_jvp import attention_jvp


class Request(Protocol):
    """A transfer under way. On NCCL `wait` makes the current stream wait, on Gloo the thread."""

    def wait(self) -> object: ...


@dataclass(frozen=True, eq=False)
class Hop:
    """A message to the next rank and one from the previous rank, under way. Holds the buffers until they are free."""

    buffers: tuple[Tensor, Tensor]
    requests: Sequence[Request]
    end: torch.cuda.Event | None

    def wait(self) -> None:
        """From here on (on CUDA: in the current stream) what arrived may be read, and what was sent may be overwritten."""
        if self.end is not None:
            torch.cuda.current_stream(self.buffers[0].device).wait_event(self.end)
            return
        for request in self.requests:
            request.wait()


@dataclass(frozen=True)
class Ring:
    """`size` ranks in a circle, of which this is `rank`.

    `exchange(send, receive)` starts the transfer to the next rank and the one from the previous rank, and returns their requests. On one
    GPU a copy can stand in for it (tools/trace_ring_overlap.py).
    """

    rank: int
    size: int
    exchange: Callable[[Tensor, Tensor], Sequence[Request]]

    @staticmethod
    def of(group: dist.ProcessGroup) -> "Ring":
        return Ring(dist.get_rank(group), dist.get_world_size(group), functools.partial(_exchange, group))

    def start_hop(self, send: Tensor, receive: Tensor) -> Hop:
        """Send `send` to the next rank and fill `receive` from the previous one.

        On CUDA the side stream waits first for all that the current stream holds by now: for what writes `send`, and for what reads the
        old content of `receive`. Compute that is issued after this call runs beside the hop. The buffers need no `record_stream`:
        the current stream waits for the end of the hop before they can be freed to it.
        """
        side = _side_stream(send.device)
        if side is None:
            return Hop((send, receive), self.exchange(send, receive), None)
        side.wait_stream(torch.cuda.current_stream(send.device))
        with torch.cuda.stream(side):
            for request in self.exchange(send, receive):
                request.wait()
            return Hop((send, receive), (), side.record_event())

    def rotate(self, block: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield (rank that owns it, block) for every block of the ring, own block first.

        A block is valid until the next iteration: its memory is reused then.
        """
        spare = torch.empty_like(block)
        for step in range(self.size):
            hop = self.start_hop(block, spare) if step < self.size - 1 else None
            yield (self.rank - step) % self.size, block
            if hop is not None:
                hop.wait()
            block, spare = spare, block


def _exchange(group: dist.ProcessGroup, send: Tensor, receive: Tensor) -> Sequence[Request]:
    """With two ranks both peers are the same rank; Gloo and NCCL then match messages in the order posted, the same on both."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    following = dist.get_global_rank(group, (rank + 1) % size)
    previous = dist.get_global_rank(group, (rank - 1) % size)
    hop = [dist.P2POp(dist.isend, send, following, group), dist.P2POp(dist.irecv, receive, previous, group)]
    return dist.batch_isend_irecv(hop)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The stream of all hops on `device`, before compute where both could run; None on a CPU."""
    return torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None


def _valid_in_block(owner: int, k: Tensor, valid_tokens: int) -> int:
    """How many keys of the block of ring rank `owner` are not padding."""
    return min(max(valid_tokens - owner * k.shape[0], 0), k.shape[0])


def ring_attention_jvp(
    ring: Ring, q: Tensor, k: Tensor, v: Tensor, tq: Tensor, tk: Tensor, tv: Tensor, valid_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(o, to, lse), o and to in q's dtype: dual attention over all blocks.

    The kernel merges a block into the fp32 carry, in place: one launch a hop."""
    carry = None
    for owner, block in ring.rotate(torch.stack((k, v, tk, tv))):
        valid_keys = _valid_in_block(owner, k, valid_tokens)
        keys = {"tk": block[2], "tv": block[3], "valid_keys": valid_keys}
        carry = attention_jvp(q, block[0], block[1], tq, **keys, carry=carry, update_carry=True)
    o, to, lse, _ = carry
    return o.to(q.dtype), to.to(q.dtype), lse


def _merge(o: Tensor, lse: Tensor, o_block: Tensor, lse_block: Tensor) -> tuple[Tensor, Tensor]:
    """Primal results of two disjoint sets of keys, at least one with a valid key; changes `o`."""
    merged = torch.logaddexp(lse, lse_block)
    w = torch.exp(lse_block - merged).permute(2, 0, 1).unsqueeze(-1)
    return o.lerp_(o_block.to(o.dtype), w), merged


def ring_forward(ring: Ring, q: Tensor, k: Tensor, v: Tensor, valid_tokens: int) -> tuple[Tensor, Tensor]:
    """Plain attention over all blocks: o in q's dtype and lse."""
    o = lse = None
    for owner, block in ring.rotate(torch.stack((k, v))):
        valid_keys = _valid_in_block(owner, k, valid_tokens)
        if valid_keys == 0:
            continue
        o_block, lse_block = attention_forward(q, block[0], block[1], valid_keys=valid_keys)
        if o is None:
            o, lse = o_block.to(lse_block.dtype), lse_block
        else:
            o, lse = _merge(o, lse, o_block, lse_block)
    return o.to(q.dtype), lse


def ring_backward(
    ring: Ring, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, valid_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv from the merged o and lse. dq is summed here, dk and dv while they travel behind their block, all in lse's dtype."""
    dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
    travelling, arriving = k.new_empty((2, 2, *k.shape), dtype=lse.dtype)
    home = hop = None
    for owner, block in ring.rotate(torch.stack((k, v))):
        valid_keys = _valid_in_block(owner, k, valid_tokens)
        _, dk, dv = attention_backward(do, q, block[0], block[1], o, lse, valid_keys=valid_keys, dq=dq)
        if owner == ring.rank:
            home = dk, dv  # of the own block, the first: they need not travel
            continue
        if hop is not None:
            hop.wait()
        for here, before, total in zip((dk, dv), arriving, travelling, strict=True):
            total.copy_(here) if hop is None else torch.add(before, here, out=total)
        hop = ring.start_hop(travelling, arriving)
    hop.wait()  # of the hop home
    dk, dv = (here.add_(others).to(k.dtype) for here, others in zip(home, arriving, strict=True))
    return dq.to(q.dtype), dk, dv
