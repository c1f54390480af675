"""The training loop: stages, updates, metrics, checkpoints, resume.

State that a checkpoint must hold is in ``Progress`` and in the networks (`TrainState`); everything random follows from (seed, iteration,
global sample index, purpose), so there is no generator to save and every layout of a run computes the same numbers.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from rcm_megatron.checkpoint.folders import checkpoint_folder, remove_old, set_aside_after
from rcm_megatron.checkpoint.resuming import Resumable, architectures, mark_ended
from rcm_megatron.config import RunConfig, StageConfig, to_yaml
from rcm_megatron.config.roles import parts_of
from rcm_megatron.data.dali import Batch
from rcm_megatron.errors import CheckpointError
from rcm_megatron.files import write_atomically
from rcm_megatron.inference.encoding import check_encoders
from rcm_megatron.objectives.plan import Step, plan_step
from rcm_megatron.parallel.groups import ParallelGroups, initialize_parallel
from rcm_megatron.platform.device import init_distributed, this_device
from rcm_megatron.platform.megatron import prepare_megatron
from rcm_megatron.runtime.profiling import profiled
from rcm_megatron.runtime.run_lock import run_lock
from rcm_megatron.runtime.stopping import Preempted, StopRequest
from rcm_megatron.runtime.timers import step_seconds
from rcm_megatron.runtime.watchdog import STARTUP_FACTOR, Watchdog
from rcm_megatron.training.batches import samples_of
from rcm_megatron.training.divergence import Diverged, Refusals
from rcm_megatron.training.flops import Throughput
from rcm_megatron.training.metrics import peak_memory_gib
from rcm_megatron.training.preview import write_previews
from rcm_megatron.training.replicas import require_same_rows
from rcm_megatron.training.state import TrainState, Updated, build_networks, timers_of
from rcm_megatron.training.surroundings import Surroundings
from rcm_megatron.training.wandb_mode import wandb_mode

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where a run stands, its networks aside. Counters are over the whole run."""

    iteration: int = 0
    nan_samples: int = 0
    skipped_samples: int = 0


def stage_at(run: RunConfig, iteration: int) -> tuple[int, int]:
    """Index of the stage of the run's ``iteration``, and the iteration within it. Raises ValueError past the last stage."""
    for index, stage in enumerate(run.stages):
        if iteration < stage.steps:
            return index, iteration
        iteration -= stage.steps
    raise ValueError(f"iteration {iteration} lies past the last stage")


class Trainer:
    """One run on this rank's share of the layout. Build it on all ranks, call :meth:`train`, then :meth:`close`."""

    def __init__(self, run: RunConfig, groups: ParallelGroups, *, meets: Surroundings | None = None) -> None:
        """``meets``: where data, weights, checkpoints and logs come from and go; by default as the configuration says."""
        meets = meets or Surroundings()
        self.run, self.groups, self.progress = run, groups, Progress()
        self.timers = timers_of(run)
        self.stop, self.refusals = StopRequest(), Refusals()
        # of the last previews, until they are in a record
        self.preview_statistics: dict[str, float] = {}
        resumable = meets.find_resumable(run)  # what is refused is refused before anything is built
        # Before the networks: a text encoder needs room of its own.
        self.null_text_L1D = meets.null_text(run).to(this_device())
        self.state = TrainState(run, build_networks(run, groups, fill=meets.fill), timers=self.timers)
        self.layout = self.state.networks.layout
        self.loader = meets.loader(run, groups)
        if resumable is not None:
            self._resume(resumable)
        self.saver = meets.saver(run)
        self.save_error: str | None = None
        """Why the newest save that has ended failed, the same on all ranks."""
        self._due = False
        self._to_delete = run.trainer.keep_checkpoints == 1
        """Whether a checkpoint may be left that the newest has outlived."""
        self.throughput = Throughput(run, devices=dist.get_world_size())
        self.logger = meets.logger(run, self.progress.iteration)

    @property
    def last_iteration(self) -> int:
        return min(self.run.total_steps, self.run.trainer.stop_after or self.run.total_steps)

    def train(
        self, *, beat: Callable[[], None] = lambda: None, after_iteration: Callable[[], None] = lambda: None
    ) -> None:
        """Run to the last iteration; saves at the configured interval and at the end. `beat` is called after each step and save.

        Raises Preempted on all ranks, a checkpoint saved, when a signal has asked any of them to stop; CheckpointError if the last save
        failed.
        """
        while self.progress.iteration < self.last_iteration:
            self.iterate()
            after_iteration()
            stop, done = self.stop.agreed(), self.progress.iteration
            beat()
            if self.saver.finished:
                self._report_save()
            last = done == self.last_iteration
            self._give_up_if_diverged(last)
            self._due |= stop or last or done % self.run.trainer.checkpoint_every == 0
            if self._due and (self.refusals.calm or ((stop or last) and self.refusals.most == 1)):
                self._due = False
                self.save()
                beat()
            if stop and not last:
                self._report_save()
                raise Preempted(f"told to stop; {self._outcome(done)} of {self.run.total_steps} iterations")
        self._report_save()
        if self.save_error is not None:
            raise CheckpointError(self.save_error)

    def _outcome(self, done: int) -> str:
        if self._due:
            return f"not saved after {done}, for the last {self.refusals.most} updates were refused: the checkpoint before stands"
        return f"saved after {done}" if self.save_error is None else f"could not save after {done}"

    def _give_up_if_diverged(self, last: bool) -> None:
        """Raise Diverged on all ranks, the newest checkpoint one from before; a run that ends in a row of refusals has diverged, too."""
        limit = self.run.trainer.max_refused_updates
        if limit is None or self.refusals.most < (min(limit, 2) if last else limit):
            return
        self._report_save()
        newest: list[str | None] = [None]
        if dist.get_rank() == 0:
            good = self.refusals.good_until
            root = checkpoint_folder(self.run)
            found = set_aside_after(root, self.progress.iteration if good is None else good, why="diverged")
            newest[0] = None if found is None else str(found)
        dist.broadcast_object_list(newest, src=0)
        raise Diverged(self.refusals.message(self.progress.iteration, newest=newest[0]))

    def close(self) -> None:
        """Wait for the save under way, end the loader's threads and the logs."""
        self._report_save()
        self.loader.close()
        self.logger.close()

    def save(self) -> None:
        """Begin to write a checkpoint of the whole run; with `trainer.async_checkpoint` training may go on at once.

        One that fails (a full disk) is reported and leaves the earlier ones as they were; the run goes on and tries again at its next."""
        self._report_save()
        start = time.perf_counter()
        progress = {"counters": asdict(self.progress), "networks": self.state.counters}
        progress |= {"refusals": self.refusals.plain(), "architectures": architectures(self.run)}
        with self.state.states() as states:
            self.saver.save(
                iteration=self.progress.iteration,
                networks=states,
                progress=progress | {"data": self.loader.state_dict()},
            )
        self._seconds_held_up = time.perf_counter() - start
        if self.saver.finished:
            self._report_save()

    def _report_save(self) -> None:
        """Wait for the save under way and say how it went."""
        saved = self.saver.wait()
        if saved is None:
            return
        self.save_error = None
        if saved.error is None:
            self._to_delete = self.run.trainer.keep_checkpoints == 1
            waited = f"training waited {self._seconds_held_up:.2f} s"
            self.logger.message(f"saved {saved.path} in {saved.seconds:.1f} s; {waited}")
            return
        self.save_error = (
            f"CHECKPOINT {saved.path} WAS NOT SAVED: {saved.error}; the checkpoints before it are as they were; fix: make room on "
            "that disk, or set output_dir to another"
        )
        if dist.get_rank() == 0:
            log.error(self.save_error)

    def iterate(self) -> None:
        """One iteration, from its data to its record."""
        iteration = self.progress.iteration
        self.timers.restart()
        index, within = stage_at(self.run, iteration)
        stage = self.run.stages[index]
        if within == 0:
            self._begin_stage(index)
        rollouts, sides = self.run.distillation.max_rollout_steps, self.run.sides
        step = plan_step(stage, within, max_rollout_steps=rollouts, sides=sides)
        with self.timers.phase("data"):
            loaded = [next(self.loader) for _ in range(self.loader.num_micro_batches)]
            if self.run.data.on_error == "skip":
                require_same_rows(loaded, self.groups)
        samples = samples_of(self.run, self.layout, loaded, self.null_text_L1D, iteration)
        first, skipped = loaded[0], sum(batch.num_skipped for batch in loaded)
        del loaded  # samples hold what the networks see of it
        done = self.state.update(step, samples, stage=stage)
        self.refusals.note(step.trained, iteration, updated=done.updated)
        self._delete_what_one_checkpoint_outlived()
        self.progress.nan_samples += int(sum(v for k, v in done.metrics.items() if k.endswith("/nan_samples")))
        self.progress.skipped_samples += self._sum_over_dp(skipped)
        self.progress.iteration += 1
        self._preview(iteration, first)
        if iteration % self.run.trainer.log_every == 0:
            self._log(iteration, step, stage, done)

    def _begin_stage(self, index: int) -> None:
        anew = self.state.begin_stage(index)
        if anew:
            self.logger.message(f"stage {self.run.stages[index].name}: the optimizer of {', '.join(anew)} begins anew")

    def _delete_what_one_checkpoint_outlived(self) -> None:
        """With keep_checkpoints=1 the one before the newest stays until an update has shown that the newest is good."""
        if not (self._to_delete and self.refusals.calm and self.saver.idle):
            return
        self._to_delete, root = False, checkpoint_folder(self.run)
        if dist.get_rank() == 0 and (root / "latest").exists():
            remove_old(root, keep=1, keep_every=self.run.trainer.keep_every)

    def _preview(self, iteration: int, batch: Batch) -> None:
        every = self.run.trainer.sample_every
        if every and (iteration + 1) % every == 0:
            students = [self.state.trained[role] for role in parts_of(("student",), self.state.trained)]
            held = self.state.residency.state(*(student.role for student in students))
            with self.timers.phase("preview"), held:
                previews = write_previews(
                    self.run,
                    students,
                    batch,
                    self.null_text_L1D,
                    iteration=iteration + 1,
                    stop=self.stop,
                )
            self.logger.log_videos(iteration, previews.videos)
            self.preview_statistics = dict(previews.statistics)

    def _log(self, iteration: int, step: Step, stage: StageConfig, done: Updated) -> None:
        record = {"stage": stage.name, "trained": step.trained, **done.metrics}
        record |= {"learning_rate": done.learning_rate, "gradient_norm": done.gradient_norm, "updated": done.updated}
        record |= {"warmup_ratio": step.warmup_ratio, "rollout_steps": step.rollout_steps}
        record |= {f"updates/{role}": network.counters.updates for role, network in self.state.trained.items()}
        record |= {"refused_updates": self.state.refused_updates}
        record |= self.preview_statistics
        self.preview_statistics = {}
        record |= {k: v for k, v in asdict(self.progress).items() if k != "iteration"}
        record |= step_seconds(self.timers.pop())
        record |= self.throughput.rates(step, record) | {"peak_memory_gib": peak_memory_gib()}
        self.logger.log(iteration, record)

    def _sum_over_dp(self, value: int) -> int:
        total = torch.tensor(value, device=this_device())
        dist.all_reduce(total, group=self.groups.dp)
        return int(total)

    def _resume(self, resumable: Resumable) -> None:
        saved = self.state.load(resumable.path)
        self.progress = Progress(**saved["counters"])
        self.refusals = Refusals(**saved["refusals"])
        self.loader.load_state_dict(saved["data"])
        notes = list(resumable.notes)
        if saved["data"]["fingerprint"] != self.loader.fingerprint:
            notes.append("the dataset is another than before: its samples come in its own order from here on")
        if dist.get_rank() == 0:
            print(f"resuming at iteration {self.progress.iteration} from {resumable.path}", flush=True)
            for note in notes:
                print(f"resuming: {note}", flush=True)


def main(run: RunConfig) -> None:
    """Train ``run`` on the ranks of the environment (torchrun, srun or one process)."""
    wandb_mode(run.logging.wandb_mode)  # refused before anything is built
    check_encoders(run)
    prepare_megatron()
    init_distributed(timeout=_collective_timeout(run))
    logging.basicConfig(level=logging.WARNING if dist.get_rank() == 0 else logging.ERROR, format="%(message)s")
    logging.getLogger("rcm_megatron").setLevel(logging.INFO if dist.get_rank() == 0 else logging.ERROR)
    groups = initialize_parallel(run.parallel)
    folder = Path(run.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with run_lock(folder), _watchdog(run) as beat:
        trainer = Trainer(run, groups)
        if dist.get_rank() == 0:
            write_atomically(folder / "config.yaml", to_yaml(run).encode())
        with (
            trainer.stop.on_signals(),
            _together_if_preempted(),
            contextlib.closing(trainer),
            _profile(trainer) as after_iteration,
        ):
            trainer.train(beat=beat, after_iteration=after_iteration)
        if dist.get_rank() == 0 and trainer.progress.iteration >= run.total_steps:
            mark_ended(run)
    dist.destroy_process_group()


def _collective_timeout(run: RunConfig) -> timedelta:
    """Later than the watchdog: when a collective's timeout comes first, the rank that hangs is killed unseen."""
    hang_timeout = run.trainer.hang_timeout
    return timedelta(minutes=10) + timedelta(seconds=STARTUP_FACTOR * (hang_timeout or 0))


@contextlib.contextmanager
def _together_if_preempted() -> Iterator[None]:
    """Leave at the same time: launchers kill all ranks when the first has ended with a status."""
    try:
        yield
    except (Preempted, Diverged):
        dist.barrier()
        raise


@contextlib.contextmanager
def _profile(trainer: Trainer) -> Iterator[Callable[[], None]]:
    """What to call after each iteration."""
    iterations, groups = trainer.run.trainer.profile, trainer.groups
    if iterations is None or groups.token_shard or groups.dp_rank:
        yield lambda: None
        return
    folder, name = Path(trainer.run.output_dir) / "profile", f"rank_{dist.get_rank()}"
    with profiled(folder, iterations=iterations, name=name, timers=trainer.timers) as after_iteration:
        yield after_iteration
    trainer.logger.message(f"traced iterations are in {folder}: open them with https://ui.perfetto.dev")


@contextlib.contextmanager
def _watchdog(run: RunConfig) -> Iterator[Callable[[], None]]:
    """What to call after each step."""
    if run.trainer.hang_timeout is None:
        yield lambda: None
        return
    watchdog = Watchdog(Path(run.output_dir) / "stacks", rank=dist.get_rank(), timeout=run.trainer.hang_timeout)
    try:
        yield watchdog.beat
    finally:
        watchdog.close()
