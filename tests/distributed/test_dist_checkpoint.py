"""Whole-run checkpoints: bit-identical resume, every other layout, saving behind the run's back, unfinished, damaged and hostile files."""

import os
import pickle
import shutil
import threading
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rcm_megatron.checkpoint import saver as saving
from rcm_megatron.checkpoint.dist import NetworkState, load_checkpoint, load_weights
from rcm_megatron.checkpoint.folders import find_latest
from rcm_megatron.checkpoint.integrity import ChecksummedFiles, entry_of, write_manifest
from rcm_megatron.checkpoint.saver import CheckpointSaver
from rcm_megatron.parallel.optimizer_shards import owned_shards
from rcm_megatron.training.ema import PowerEMA
from tests.distributed.harness import RankError, run_ranks
from tests.distributed.toy_model import ToyRun, gather_full

PROGRESS = {
    "iteration": 3,
    "stage": "scm",
    "data": {"epoch": 1, "position": 12},
    "counters": [1, 2.5, None],
    "rng": torch.arange(9, dtype=torch.uint8),
}


class Training:
    """Two networks, as in rCM: the student with EMA, the fake score without."""

    def __init__(self, *, tp, cp):
        self.student = ToyRun(tp=tp, cp=cp, dtype=torch.bfloat16)
        self.ema = PowerEMA(self.student.optimizer, 0.1)
        self.fake_score = self.student.twin()
        self.networks = {
            "student": NetworkState(chunks=self.student.chunks, optimizer=self.student.optimizer, ema=self.ema.shards),
            "fake_score": NetworkState(chunks=self.fake_score.chunks, optimizer=self.fake_score.optimizer),
        }

    def train(self, steps):
        for step in steps:
            self.student.train([step])
            self.ema.update(step + 1)
            self.fake_score.train([10 + step])

    def everything(self):
        """All tensors of the run, whole, by name: the same in every layout."""
        found = {}
        for name, network in self.networks.items():
            weights = dict(network.chunks[0].module.named_parameters())
            kinds = {"model": weights} | {
                kind: self.local_tensors(network, kind, weights)
                for kind in ("main", "exp_avg", "exp_avg_sq") + (("ema",) if network.ema else ())
            }
            for kind, tensors in kinds.items():
                whole = gather_full(tensors, self.student.groups)
                found |= {f"{name}.{kind}.{key}": value for key, value in whole.items()}
        return found

    def local_tensors(self, network, kind, weights):
        """One kind of optimizer tensor, put together over dp*cp, in the shapes of this rank's parameters."""
        local = {key: torch.zeros(weight.numel()) for key, weight in weights.items()}
        for index, shard in enumerate(owned_shards(network.optimizer)):
            state = {"main": shard.main.detach(), **shard.adam_state()}
            local[shard.name][shard.start : shard.stop] = network.ema[index] if kind == "ema" else state[kind]
        for tensor in local.values():
            dist.all_reduce(tensor, group=self.student.groups.dp_cp)
        return {key: tensor.view(weights[key].shape) for key, tensor in local.items()}

    def forget(self):
        """Overwrite every tensor and step count that a checkpoint must restore."""
        for network in self.networks.values():
            for shard in owned_shards(network.optimizer):
                for tensor in (shard.main.detach(), *shard.adam_state().values()):
                    tensor.fill_(-1.0)
            for parameter in network.chunks[0].parameters():
                parameter.data.fill_(-2.0)
            for group in network.optimizer.param_groups:
                group["step"] = -3
        for average in self.ema.shards:
            average.fill_(-4.0)


def save_checkpoint(root, *, iteration, networks, progress):
    """Write and wait; one that failed is an error."""
    saver = CheckpointSaver(root, keep=10, background=False)
    saver.save(iteration=iteration, networks=networks, progress=progress)
    saved = saver.wait()
    assert saved.error is None, saved.error
    return saved.path


def assert_equal(reference, found):
    assert reference.keys() == found.keys()
    different = [name for name, value in reference.items() if not torch.equal(value, found[name])]
    assert not different


def train_save_and_go_on(root, tp, cp):
    training = Training(tp=tp, cp=cp)
    training.train(range(3))
    shared = sum(not shard.whole for shard in owned_shards(training.student.optimizer))
    save_checkpoint(root, iteration=3, networks=training.networks, progress=PROGRESS)
    saved = training.everything()
    training.train(range(3, 6))
    return saved, training.everything(), shared


def load_and_go_on(root, tp, cp):
    training = Training(tp=tp, cp=cp)
    progress = load_checkpoint(find_latest(root), networks=training.networks)
    loaded = training.everything()
    training.train(range(3, 6))
    return loaded, training.everything(), progress


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of TP2 x DP2 and what that run held when it was saved and three steps later."""
    root = tmp_path_factory.mktemp("run")
    results = run_ranks(train_save_and_go_on, 4, str(root), 2, 1)
    assert any(shared for _, _, shared in results), "no parameter is shared between ranks: the test would prove little"
    return types.SimpleNamespace(root=root, saved=results[0][0], later=results[0][1])


def test_same_layout_resumes_bit_for_bit(checkpoint):
    for loaded, later, progress in run_ranks(load_and_go_on, 4, str(checkpoint.root), 2, 1):
        assert_equal(checkpoint.saved, loaded)
        assert_equal(checkpoint.later, later)
        assert torch.equal(progress.pop("rng"), PROGRESS["rng"])
        assert progress == {key: value for key, value in PROGRESS.items() if key != "rng"}


def load_save_and_load(root, other_root):
    """Over four dp*cp ranks, where one parameter has more than two owners."""
    training = Training(tp=1, cp=2)
    progress = load_checkpoint(find_latest(root), networks=training.networks)
    owners = max(len(shard.owners) for shard in owned_shards(training.student.optimizer))
    save_checkpoint(other_root, iteration=3, networks=training.networks, progress=progress)
    training.forget()
    load_checkpoint(find_latest(other_root), networks=training.networks)
    steps = {group["step"] for network in training.networks.values() for group in network.optimizer.param_groups}
    return training.everything(), owners, steps


def test_parameters_with_many_owners_are_written_whole(checkpoint, tmp_path):
    results = run_ranks(load_save_and_load, 4, str(checkpoint.root), str(tmp_path))
    assert max(owners for _, owners, _ in results) > 2
    for loaded, _, steps in results:
        assert_equal(checkpoint.saved, loaded)
        assert steps == {3}


@pytest.mark.parametrize(("tp", "cp", "ranks"), [(1, 1, 1), (1, 1, 2), (2, 1, 2)])
def test_another_layout_loads_the_same_state(checkpoint, tp, cp, ranks):
    for loaded, later, _ in run_ranks(load_and_go_on, ranks, str(checkpoint.root), tp, cp):
        assert_equal(checkpoint.saved, loaded)
        for name, value in checkpoint.later.items():
            rel = 2e-2 if ".exp_avg" in name else 5e-3
            error = float((value - later[name]).norm() / value.norm())
            assert error < rel, f"{name}: {error}"


def load_only_the_ema(root):
    run = ToyRun(tp=1, dtype=torch.float32)
    load_weights(find_latest(root), run.chunks, network="student", kind="ema")
    return run.weights()


def test_ema_weights_load_alone(checkpoint):
    for weights in run_ranks(load_only_the_ema, 2, str(checkpoint.root)):
        assert_equal({name: checkpoint.saved[f"student.ema.{name}"] for name in weights}, weights)


def load_parts(root):
    """The checkpoint into a run that trains one of its networks, then into one that averages nothing; the keys left to be read."""
    training = Training(tp=1, cp=1)
    networks, latest = training.networks, find_latest(root)
    first = load_checkpoint(latest, networks={"student": networks["student"]})
    networks["student"].ema = None
    return first.keys() == load_checkpoint(latest, networks=networks).keys()


def test_a_checkpoint_with_more_than_the_run_has_loads(checkpoint):
    assert run_ranks(load_parts, 1, str(checkpoint.root)) == [True]


# ---- saving while training goes on


def save_behind_the_back(root):
    """Train on while a file is held open half written; bytes of that checkpoint, of a synchronous one, and what was in it."""
    training, gate, create_stream = Training(tp=2, cp=1), threading.Event(), ChecksummedFiles.create_stream
    training.train(range(2))
    save_checkpoint(f"{root}/synchronous", iteration=2, networks=training.networks, progress={"iteration": 2})
    saved = training.everything()

    def held(files, path, mode):
        gate.wait(60)
        return create_stream(files, path, mode)

    ChecksummedFiles.create_stream = held
    saver, progress = CheckpointSaver(root, keep=10), {"iteration": 2, "data": [1]}
    saver.save(iteration=2, networks=training.networks, progress=progress)
    with pytest.raises(RuntimeError, match="another is under way"):
        saver.save(iteration=2, networks=training.networks, progress=progress)
    progress["data"].append(2)
    training.train(range(2, 4))
    early = (saver.finished, find_latest(root))
    gate.set()
    outcome = saver.wait()
    ChecksummedFiles.create_stream = create_stream
    training.forget()
    progress = load_checkpoint(find_latest(root), networks=training.networks)
    return early, outcome.error, saver.wait(), saved, training.everything(), progress


def test_a_checkpoint_holds_the_iteration_of_its_save_though_training_goes_on(tmp_path):
    for early, error, nothing, saved, loaded, progress in run_ranks(save_behind_the_back, 4, str(tmp_path)):
        assert early == (False, None) and error is None and nothing is None
        assert_equal(saved, loaded)
        assert progress == {"iteration": 2, "data": [1]}
    ours, synchronous = tmp_path / "iter_0000002", tmp_path / "synchronous" / "iter_0000002"
    tensors = [path.name for path in sorted(ours.glob("*.distcp"))]
    assert tensors == [path.name for path in sorted(synchronous.glob("*.distcp"))] and len(tensors) > 1
    different = [name for name in tensors if (ours / name).read_bytes() != (synchronous / name).read_bytes()]
    assert not different


def killed_while_saving(root, place):
    training = Training(tp=1, cp=1)
    save_checkpoint(root, iteration=1, networks=training.networks, progress={"iteration": 1})
    training.train([0])

    def die(*args, **kwargs):
        raise SystemExit  # ends the thread and cleans nothing up

    module, name = {"writing": (saving.torch_checkpoint, "save"), "publishing": (saving.folders, "publish")}[place]
    original = getattr(module, name)
    setattr(module, name, die)
    saver = CheckpointSaver(root, keep=10)
    saver.save(iteration=2, networks=training.networks, progress={"iteration": 2})
    assert saver.wait() is None
    setattr(module, name, original)
    found = find_latest(root).name
    unfinished = (Path(root) / "iter_0000002.tmp").is_dir()
    save_checkpoint(root, iteration=3, networks=training.networks, progress={"iteration": 3})
    return found, unfinished, find_latest(root).name, load_checkpoint(find_latest(root), networks=training.networks)


@pytest.mark.parametrize("place", ["writing", "publishing"])
def test_an_unfinished_checkpoint_is_never_found_and_goes_with_the_next_save(tmp_path, place):
    [result] = run_ranks(killed_while_saving, 1, str(tmp_path), place)
    assert result == ("iter_0000001", True, "iter_0000003", {"iteration": 3})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000001", "iter_0000003", "latest"]


def save_on_a_full_disk(root, place, full_rank):
    """Errors of a save where the disk is full for `full_rank` at `place`, and of the one after."""
    training, saver = Training(tp=1, cp=1), CheckpointSaver(root, keep=10)
    save_checkpoint(root, iteration=1, networks=training.networks, progress={"iteration": 1})

    def full(*args, **kwargs):
        if dist.get_rank() == full_rank:
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    module, name = {
        "beginning": (saving.folders, "prepare"),
        "writing": (ChecksummedFiles, "create_stream"),
        "publishing": (saving.folders, "publish"),
    }[place]
    original = getattr(module, name)
    setattr(module, name, full)
    errors = []
    for iteration in (2, 3):
        saver.save(iteration=iteration, networks=training.networks, progress={"iteration": iteration})
        errors.append(saver.wait().error)
        assert not list(Path(root).glob("*.tmp")), "a full disk needs the room"
        errors.append(find_latest(root).name)
        setattr(module, name, original)
    return errors


@pytest.mark.parametrize(("place", "rank"), [("beginning", 0), ("writing", 1), ("publishing", 0)])
def test_a_full_disk_fails_the_save_on_all_ranks_and_leaves_what_was_there(tmp_path, place, rank):
    for error, latest, next_error, next_latest in run_ranks(save_on_a_full_disk, 2, str(tmp_path), place, rank):
        assert f"rank {rank}: OSError(28, 'No space left on device')" in error and latest == "iter_0000001"
        assert next_error is None and next_latest == "iter_0000003"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000001", "iter_0000003", "latest"]


# ---- trust


class Hostile:
    def __reduce__(self):
        return os.mkdir, (f"{Path(__file__).parent}/hostile_code_ran",)


@pytest.mark.parametrize("file", [".metadata", "common.pt"])
def test_a_pickle_that_runs_code_is_refused(checkpoint, tmp_path, file):
    folder = tmp_path / "iter_0000003"
    folder.mkdir()
    for path in (checkpoint.root / "iter_0000003").iterdir():
        shutil.copy(path, folder)
    if file == ".metadata":
        (folder / file).write_bytes(pickle.dumps(Hostile()))
    else:
        torch.save({"format": Hostile()}, folder / file)
    (folder / "files.json").unlink()
    write_manifest(folder, {path.name: entry_of(path) for path in folder.iterdir()})
    with pytest.raises(RankError, match="UnpicklingError"):
        run_ranks(load_and_go_on, 1, str(tmp_path), 1, 1)
    assert not (Path(__file__).parent / "hostile_code_ran").exists()


def save_an_object(root):
    training = Training(tp=1, cp=1)
    save_checkpoint(root, iteration=1, networks=training.networks, progress={"data": {"path": Path("x")}})


def test_progress_that_would_not_load_is_refused_when_saving(tmp_path):
    with pytest.raises(RankError, match=r"progress\['data'\]\['path'\]: got PosixPath; need plain data"):
        run_ranks(save_an_object, 1, str(tmp_path))
    assert not any(tmp_path.iterdir())
