"""What can go wrong in a step, or is watched, put into a trainer: each function returns a dict that it fills during the run."""

import hashlib
import os
import signal
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from rcm_megatron.checkpoint.integrity import ChecksummedFiles
from rcm_megatron.dual import primal_of

SCM_ITERATION, RCM_ITERATION = 2, 9
"""A student step of the first stage, and one of the second (sCM and DMD)."""


def _nan_once(trainer, module, iteration):
    """The first pass of `module` in `iteration` gives one NaN: in the first sample, and on one rank alone."""
    original, calls = module.forward, []

    def forward(*args):
        v = original(*args)
        if trainer.progress.iteration == iteration and not calls:
            calls.append(iteration)
            if trainer.groups.token_shard == 0 and trainer.groups.dp_rank == 0:
                v = v.clone()
                v[0, 0, 0] = float("nan")
        return v

    module.forward = forward
    return {}


def nan_from_teacher(trainer):
    return _nan_once(trainer, trainer.state.networks["teacher"][0], SCM_ITERATION)


def nan_from_fake_score(trainer):
    return _nan_once(trainer, trainer.state.networks["fake_score"][0].module, RCM_ITERATION)


def _poison_latents(trainer, iteration, samples_of_a_rank):
    """NaN latents that got past the loader in ``iteration``, on the ranks that hold their first tokens."""
    update = trainer.state.update

    def poisoned(step, samples, **settings):
        if trainer.progress.iteration == iteration and trainer.groups.token_shard == 0:
            samples.x0_SBP[0, samples_of_a_rank, 0] = float("nan")
        return update(step, samples, **settings)

    trainer.state.update = poisoned


def one_nan_latent(trainer):
    """The first sample of each data-parallel rank."""
    _poison_latents(trainer, SCM_ITERATION, 0)
    return {}


def only_nan_latents(trainer):
    _poison_latents(trainer, SCM_ITERATION, slice(None))
    return _state_around(trainer, SCM_ITERATION)


def nan_gradient(trainer, iteration):
    """The student's backward of ``iteration`` begins with a NaN, on one rank alone."""
    module = trainer.state.networks["student"][-1].module
    forward, groups = module.forward, trainer.groups

    def poisoned(*args):
        v = forward(*args)
        first = groups.token_shard == groups.dp_rank == 0 and groups.pp.rank() == groups.pp.size() - 1
        if trainer.progress.iteration == iteration and first and primal_of(v).requires_grad:
            primal_of(v).register_hook(lambda gradient: gradient * float("nan"))
        return v

    module.forward = poisoned


def nan_in_backward(trainer):
    nan_gradient(trainer, RCM_ITERATION)
    return _state_around(trainer, RCM_ITERATION)


def _state_around(trainer, watched_iteration):
    """Notes the student's weights and moments before and after an iteration."""
    from tests.distributed.tiny_run import whole_weights

    noted, iterate = {}, trainer.iterate

    def watched():
        iteration = trainer.progress.iteration
        if iteration == watched_iteration:
            noted["before"] = state(trainer)
        iterate()
        if iteration == watched_iteration:
            noted["after"] = state(trainer)

    def state(trainer):
        moments = [
            value.clone()
            for part in trainer.state.trained["student"].optimizer.chained_optimizers
            for moments in part.optimizer.state.values()
            for value in moments.values()
            if isinstance(value, torch.Tensor)
        ]
        return {
            "weights": whole_weights(trainer)["student"],
            "moments": moments,
            "ema": [s.clone() for s in trainer.state.trained["student"].ema.shards],
        }

    trainer.iterate = watched
    return noted


def data_of_each_update(trainer):
    """Notes (global sample indices, dataset rows) of the micro-batches of every iteration on this rank."""
    noted, read = {"data": {}}, type(trainer.loader).__next__

    class Watched(type(trainer.loader)):
        def __next__(self):
            batch = read(self)
            found = zip(batch.sample_indices.tolist(), batch.dataset_rows.tolist(), strict=True)
            noted["data"].setdefault(trainer.progress.iteration, []).extend(found)
            return batch

    trainer.loader.__class__ = Watched
    return noted


def other_rows_on_the_last_rank(trainer):
    """From iteration 1 on the last rank reads other samples than the rest of its replica."""
    read, last = type(trainer.loader).__next__, dist.get_rank() == dist.get_world_size() - 1

    class Disagreeing(type(trainer.loader)):
        def __next__(self):
            batch = read(self)
            other = last and trainer.progress.iteration == 1
            return replace(batch, dataset_rows=batch.dataset_rows + 1) if other else batch

    trainer.loader.__class__ = Disagreeing
    return {}


def disk_full_in(trainer, iterations):
    """The last rank's disk is full while checkpoints of `iterations` are written."""
    create_stream, last = ChecksummedFiles.create_stream, dist.get_rank() == dist.get_world_size() - 1

    def full(files, path, mode):
        if last and int(Path(path).parent.name.split("_")[1].removesuffix(".tmp")) in iterations:
            raise OSError(28, "No space left on device")
        return create_stream(files, path, mode)

    ChecksummedFiles.create_stream = full
    return {}


def told_to_stop_while_sampling(trainer):
    """A signal reaches the last rank while the student is sampled for a preview."""
    from rcm_megatron.training import preview

    student_videos = preview.student_videos

    def told(*args):
        if dist.get_rank() == dist.get_world_size() - 1:
            trainer.stop._note(signal.SIGUSR1, None)
        return student_videos(*args)

    preview.student_videos = told
    return {}


def told_to_stop_while_writing_videos(trainer):
    """A signal reaches the ranks while the first one writes the first video of a preview."""
    from rcm_megatron.training import preview

    write_mp4 = preview.write_mp4

    def told(*args, **kwargs):
        trainer.stop._note(signal.SIGUSR1, None)
        return write_mp4(*args, **kwargs)

    preview.write_mp4 = told
    return {}


def disk_full_at_3(trainer):
    return disk_full_in(trainer, (3,))


def disk_full_at_the_end(trainer):
    return disk_full_in(trainer, (6,))


SPLIT = "time_projection."
"""Over tensor-parallel ranks."""
EMBEDDERS = ("text_embedding.", "time_embedding.", SPLIT)
"""What every pipeline stage holds a copy of."""


def digests_of_embedders(trainer):
    """Notes digests of the embedders' bits of each chunk of each trained network after every iteration: (held whole, split over tp)."""
    noted, iterate = {"digests": []}, trainer.iterate

    def watched():
        iterate()
        for network in ("student", "fake_score"):
            noted["digests"].append([_digests(chunk.module) for chunk in trainer.state.networks[network]])

    trainer.iterate = watched
    return noted


def _digests(module):
    digests = [hashlib.blake2b(digest_size=8) for _ in range(2)]
    for name, parameter in module.named_parameters():
        if name.startswith(EMBEDDERS):
            is_split = getattr(parameter, "tensor_model_parallel", False)
            digests[is_split].update(parameter.detach().numpy().tobytes())
    return tuple(digest.hexdigest() for digest in digests)


def main():
    """`python -m rcm_megatron train` whose rank 1 kills itself in iteration 13, while the others reduce gradients; once."""
    import sys

    from rcm_megatron import __main__
    from rcm_megatron.platform.megatron import prepare_megatron

    prepare_megatron()
    from rcm_megatron.training import state

    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        reduce_gradients, calls = state.reduce_gradients, []

        def reduce_or_die(chunks):
            calls.append(1)
            if len(calls) == 14:
                os.kill(os.getpid(), signal.SIGKILL)
            reduce_gradients(chunks)

        state.reduce_gradients = reduce_or_die
    sys.exit(__main__.main(sys.argv[1:]))


if __name__ == "__main__":
    main()
