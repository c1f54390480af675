"""Whole-run checkpoints: bit-identical resume, every other layout, unfinished and hostile files."""

import contextlib
import logging
import os
import pickle
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingException

from rcm_megatron.checkpoint import dist as checkpoints
from rcm_megatron.checkpoint.dist import NetworkState, find_latest, load_checkpoint, load_weights, save_checkpoint
from rcm_megatron.checkpoint.folders import remove_old
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


def errors_of_other_contents(root):
    networks = Training(tp=1, cp=1).networks
    latest, messages = find_latest(root), []
    networks["student"].ema = None
    for asked in ({"student": networks["student"]}, networks):
        with pytest.raises((ValueError, CheckpointingException)) as caught:
            load_checkpoint(latest, networks=asked)
        messages.append(str(caught.value))
    return messages


def test_a_checkpoint_of_other_contents_is_an_error_that_names_them(checkpoint):
    [(networks, tensors)] = run_ranks(errors_of_other_contents, 1, str(checkpoint.root))
    assert "got the networks ['fake_score', 'student']; need ['student']" in networks
    assert "student.ema.head" in tensors


# ---- killed while saving


def killed_while_saving(root, place):
    training = Training(tp=1, cp=1)
    save_checkpoint(root, iteration=1, networks=training.networks, progress={"iteration": 1})
    training.train([0])

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    module, name = {"writing": (checkpoints.torch_checkpoint, "save"), "publishing": (checkpoints, "publish")}[place]
    original = getattr(module, name)
    setattr(module, name, die)
    with contextlib.suppress(KeyboardInterrupt):
        save_checkpoint(root, iteration=2, networks=training.networks, progress={"iteration": 2})
    setattr(module, name, original)
    found = find_latest(root).name
    save_checkpoint(root, iteration=2, networks=training.networks, progress={"iteration": 2})
    return found, find_latest(root).name, load_checkpoint(find_latest(root), networks=training.networks)


@pytest.mark.parametrize("place", ["writing", "publishing"])
def test_an_unfinished_checkpoint_is_never_found_and_can_be_written_again(tmp_path, place):
    [result] = run_ranks(killed_while_saving, 1, str(tmp_path), place)
    assert result == ("iter_0000001", "iter_0000002", {"iteration": 2})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000001", "iter_0000002", "latest"]


def complete_folder(root, name):
    folder = root / name
    folder.mkdir()
    for file in ("common.pt", ".metadata", "metadata.json"):
        (folder / file).touch()
    return folder


def test_latest_is_followed_and_unfinished_folders_are_named_in_the_log(tmp_path, caplog):
    assert find_latest(tmp_path) is None
    first, second = complete_folder(tmp_path, "iter_0000100"), complete_folder(tmp_path, "iter_0000200")
    complete_folder(tmp_path, "iter_0000300.tmp")
    (complete_folder(tmp_path, "iter_0000400") / "metadata.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert find_latest(tmp_path) == second
    second.rename(tmp_path / "iter_0000200.replaced")
    assert find_latest(tmp_path).name == "iter_0000200.replaced", "a kill between two renames"
    (tmp_path / "iter_0000200.replaced").rename(second)
    assert "iter_0000300.tmp: an unfinished checkpoint" in caplog.text
    assert "iter_0000400: an unfinished checkpoint" in caplog.text
    (tmp_path / "latest").write_text("iter_0000100\n")
    assert find_latest(tmp_path) == first, "a run that went back goes on from where it went back to"
    (tmp_path / "latest").write_text("../elsewhere")
    assert find_latest(tmp_path) == second


def test_old_checkpoints_go_but_never_the_latest(tmp_path):
    for iteration in (100, 200, 300, 400):
        complete_folder(tmp_path, f"iter_{iteration:07d}")
    (tmp_path / "latest").write_text("iter_0000100\n")
    remove_old(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "iter_0000100",
        "iter_0000300",
        "iter_0000400",
        "latest",
    ]


# ---- trust


class Hostile:
    def __reduce__(self):
        return os.mkdir, (f"{Path(__file__).parent}/hostile_code_ran",)


@pytest.mark.parametrize("file", [".metadata", "common.pt"])
def test_a_pickle_that_runs_code_is_refused(checkpoint, tmp_path, file):
    folder = tmp_path / "iter_0000003"
    folder.mkdir()
    for path in (checkpoint.root / "iter_0000003").iterdir():
        os.link(path, folder / path.name)
    (folder / file).unlink()
    if file == ".metadata":
        (folder / file).write_bytes(pickle.dumps(Hostile()))
    else:
        torch.save({"format": Hostile()}, folder / file)
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
