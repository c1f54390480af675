"""The training loader: decoded samples, in the one order of the manifest, through an NVIDIA DALI pipeline.

Threads read and decode ahead; DALI's external source takes their arrays in order, fills the text up to text_len, builds the
batch and moves it to the GPU, `prefetch` micro-batches ahead of the consumer.

Shapes: B micro-batch, C channels, T frames, H, W, L text positions, D text width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor

from rcm_megatron.data.samples import LoadedSample, SampleError, SampleSource

if TYPE_CHECKING:
    from nvidia.dali import Pipeline

Arrays = list[list[np.ndarray]]
"""Of each output of the pipeline, one array a sample."""
_STATE_KEYS = ("next_sample", "seed", "fingerprint")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of one data-parallel rank."""

    latent_BCTHW: Tensor
    """fp32, on the loader's device."""
    text_LBD: Tensor
    """fp32 [L, b, D], zeros after each prompt, on the loader's device."""
    prompts: tuple[str, ...]
    sample_indices: Tensor
    """int64 [b] on the CPU: global sample indices, which count up over the run. Noise and times are drawn from these."""
    dataset_rows: Tensor
    """int64 [b] on the CPU: rows of the manifest. Equal on all ranks of a model replica, unless their disks disagree."""
    num_skipped: int
    """How many of them stand in for unusable samples."""
    image_latent_BCTHW: Tensor | None = None
    """fp32, on the loader's device, for networks that are given it: the latent of the image alone."""
    image_LBD: Tensor | None = None
    """fp32 CLIP features [257, b, 1280], on the loader's device, for networks that are given them."""


def micro_batch_indices(*, first: int, micro_batch: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> range:
    """Global sample indices of one micro-batch of one rank, in the global batch that begins at sample `first`.

    The ranks' micro-batches number m lie side by side: [first + (m * dp_size + dp_rank) * micro_batch_size, …).
    """
    start = first + (micro_batch * dp_size + dp_rank) * micro_batch_size
    return range(start, start + micro_batch_size)


class LatentLoader:
    """Endless iterator over the micro-batches of one data-parallel rank.

    Global batch k of a run holds the global samples [k * global_batch_size, (k + 1) * global_batch_size) on every layout; ranks
    that differ in tp, cp or pp only pass the same `dp_rank` and read the same samples. `start_sample` is where to begin or
    resume. `device="cuda"` (or "cuda:1") has DALI copy to that GPU. Close it, or use it in a `with` block, to end its threads.
    Raises ValueError for sizes that do not divide, and without a thread or a batch read ahead.
    """

    def __init__(
        self,
        source: SampleSource,
        *,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        global_batch_size: int,
        start_sample: int = 0,
        num_threads: int = 2,
        prefetch: int = 2,
        device: str | torch.device = "cpu",
    ) -> None:
        _check_sizes(micro_batch_size, dp_rank, dp_size, global_batch_size, start_sample)
        if min(num_threads, prefetch) < 1:
            raise ValueError(f"num_threads={num_threads} and prefetch={prefetch} must be at least 1")
        self.num_micro_batches = global_batch_size // (micro_batch_size * dp_size)
        """Per global batch and rank."""
        self.num_skipped = 0
        """Samples replaced on this rank since the loader was made."""
        self._source = source
        self._micro_batch_size = micro_batch_size
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        self._global_batch_size = global_batch_size
        self._num_threads = num_threads
        self._prefetch = prefetch
        self._device = torch.device(device)
        self._threads: ThreadPoolExecutor | None = None
        self._rewind(start_sample)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next micro-batch. SampleError when its turn comes, not when it is read ahead."""
        if self._pipeline is None:
            self._start()
        outputs = self._pipeline.run()
        loaded = self._handed_over.popleft()
        if isinstance(loaded, SampleError):
            self.close()  # so that whoever goes on meets the same sample again, and not the one behind it
            raise loaded
        self._consumed += 1
        num_skipped = sum(sample.replaced for sample in loaded)
        self.num_skipped += num_skipped
        tensors = {
            name: torch.from_dlpack(output.as_tensor())
            for name, output in zip(self._source.shapes, outputs, strict=True)
        }
        image_BLD = tensors.get("image_embed_LD")
        return Batch(
            latent_BCTHW=tensors["latent_CTHW"],
            text_LBD=tensors["embed_LD"].transpose(0, 1).contiguous(),
            image_latent_BCTHW=tensors.get("image_latent_CTHW"),
            image_LBD=None if image_BLD is None else image_BLD.transpose(0, 1).contiguous(),
            prompts=tuple(sample.prompt for sample in loaded),
            sample_indices=torch.tensor([sample.index for sample in loaded]),
            dataset_rows=torch.tensor([sample.row for sample in loaded]),
            num_skipped=num_skipped,
        )

    def state_dict(self) -> dict[str, int | str]:
        """The data position, the same on every rank; RuntimeError within a global batch."""
        batches, rest = divmod(self._consumed, self.num_micro_batches)
        if rest:
            raise RuntimeError(
                f"got {rest} of {self.num_micro_batches} micro-batches of a global batch; save between global batches"
            )
        next_sample = self._first_sample + batches * self._global_batch_size
        return {"next_sample": next_sample, "seed": self._source.seed, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: Mapping[str, int | str]) -> None:
        """Go on after as many samples as where `state_dict` was taken, on this or another layout.

        With another seed or dataset the samples from there on are those of the new order: of an epoch some may come twice, some not.
        Raises ValueError for a state that is not whole.
        """
        missing = [key for key in _STATE_KEYS if key not in state]
        if missing:
            raise ValueError(f"the data position lacks {missing}, need {_STATE_KEYS}")
        self.close()
        self._rewind(int(state["next_sample"]))

    @property
    def fingerprint(self) -> str:
        """Of the dataset."""
        return self._source.manifest.fingerprint

    def close(self) -> None:
        """End the threads and free DALI's buffers. Iterating again starts them anew, at the next unread micro-batch."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
            self._threads = None
        self._pipeline = None
        self._pending.clear()
        self._handed_over.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rewind(self, start_sample: int) -> None:
        self._first_sample = start_sample
        self._consumed = 0
        self._pipeline = None
        self._pending: deque[list[Future[LoadedSample]]] = deque()
        self._handed_over: deque[list[LoadedSample] | SampleError] = deque()

    def _start(self) -> None:
        self._threads = ThreadPoolExecutor(self._num_threads, thread_name_prefix="latents")
        self._submitted = self._consumed
        self._pipeline = _build_pipeline(
            self._next_arrays,
            shapes=self._source.shapes,
            batch_size=self._micro_batch_size,
            prefetch=self._prefetch,
            device=self._device,
        )

    def _submit_ahead(self) -> None:
        """Keep enough samples in the threads' queue that none of them waits for the consumer."""
        ahead = 1 + -(-2 * self._num_threads // self._micro_batch_size)
        while len(self._pending) < ahead:
            batch, micro_batch = divmod(self._submitted, self.num_micro_batches)
            indices = micro_batch_indices(
                first=self._first_sample + batch * self._global_batch_size,
                micro_batch=micro_batch,
                micro_batch_size=self._micro_batch_size,
                dp_rank=self._dp_rank,
                dp_size=self._dp_size,
            )
            self._pending.append([self._threads.submit(self._source.__getitem__, index) for index in indices])
            self._submitted += 1

    def _next_arrays(self) -> Arrays:
        """DALI's callback, in the consumer's thread. An error is kept for `__next__`: DALI asks `prefetch` batches early."""
        self._submit_ahead()
        futures = self._pending.popleft()
        self._submit_ahead()
        try:
            loaded = [future.result() for future in futures]
        except SampleError as error:
            self._handed_over.append(error)
            return [[np.zeros(shape, np.float32)] * self._micro_batch_size for shape in self._source.shapes.values()]
        self._handed_over.append(loaded)
        return [[getattr(sample, name) for sample in loaded] for name in self._source.shapes]


def _check_sizes(micro_batch_size: int, dp_rank: int, dp_size: int, global_batch_size: int, start_sample: int) -> None:
    if min(micro_batch_size, dp_size, global_batch_size) < 1 or start_sample < 0 or not 0 <= dp_rank < dp_size:
        raise ValueError(
            f"micro_batch_size={micro_batch_size}, global_batch_size={global_batch_size} and dp_size={dp_size} must be at "
            f"least 1, dp_rank={dp_rank} in [0, dp_size), start_sample={start_sample} at least 0"
        )
    if global_batch_size % (micro_batch_size * dp_size):
        raise ValueError(
            f"global_batch_size={global_batch_size} must divide by micro_batch_size*dp_size={micro_batch_size}*{dp_size}; "
            "change one of them"
        )


def _build_pipeline(
    source: Callable[[], Arrays],
    *,
    shapes: Mapping[str, tuple[int, ...]],
    batch_size: int,
    prefetch: int,
    device: torch.device,
) -> Pipeline:
    """The DALI pipeline around `source`, which gives the arrays named in `shapes`; texts are filled up to text_len."""
    try:
        from nvidia.dali import Pipeline, fn, types
    except ImportError as error:
        raise ImportError(
            "NVIDIA DALI is needed to read training data; install it with: pip install nvidia-dali-cuda130"
        ) from error
    on_gpu = device.type == "cuda"
    device_id = (torch.cuda.current_device() if device.index is None else device.index) if on_gpu else None
    # One DALI thread: its work is one copy and one fill per batch, the decoding happens in ours.
    # exec_dynamic hands its buffers over for good, so a batch stays valid without a copy.
    pipeline = Pipeline(
        batch_size=batch_size,
        num_threads=1,
        device_id=device_id,
        prefetch_queue_depth=prefetch,
        exec_dynamic=True,
    )
    with pipeline:
        dims = [len(shape) for shape in shapes.values()]
        outputs = fn.external_source(
            source=source, num_outputs=len(dims), batch=True, dtype=[types.FLOAT] * len(dims), ndim=dims
        )
        arrays = dict(zip(shapes, outputs, strict=True))
        arrays["embed_LD"] = fn.pad(arrays["embed_LD"], axes=[0], shape=[shapes["embed_LD"][0]], fill_value=0)
        pipeline.set_outputs(*(array.gpu() if on_gpu else array for array in arrays.values()))
    pipeline.build()
    return pipeline
