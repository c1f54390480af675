"""Folders of whole-run checkpoints: which is the newest, which go, and damaged ones."""

import json
import logging
import os
from pathlib import Path

import pytest
import torch.distributed as dist

from rcm_megatron.checkpoint.folders import find_latest, publish, remove_old
from rcm_megatron.checkpoint.integrity import entry_of, write_manifest
from rcm_megatron.errors import CheckpointError
from tests.distributed.harness import run_ranks


def complete_folder(root, name):
    folder = root / name
    folder.mkdir()
    for file in ("common.pt", ".metadata", "__0_0.distcp"):
        (folder / file).write_bytes(f"{file} of {name}".encode())
    write_manifest(folder, {path.name: entry_of(path) for path in folder.iterdir()})
    return folder


def test_latest_is_followed_and_unfinished_folders_are_named_in_the_log(tmp_path, caplog):
    assert find_latest(tmp_path) is None
    first, second = complete_folder(tmp_path, "iter_0000100"), complete_folder(tmp_path, "iter_0000200")
    complete_folder(tmp_path, "iter_0000300.tmp")
    with caplog.at_level(logging.WARNING):
        assert find_latest(tmp_path) == second
    second.rename(tmp_path / "iter_0000200.replaced")
    assert find_latest(tmp_path).name == "iter_0000200.replaced", "a kill between two renames"
    (tmp_path / "iter_0000200.replaced").rename(second)
    assert "iter_0000300.tmp: an unfinished checkpoint" in caplog.text
    (tmp_path / "latest").write_text("iter_0000100\n")
    assert find_latest(tmp_path) == first, "a run that went back goes on from where it went back to"
    (tmp_path / "latest").write_text("../elsewhere")
    assert find_latest(tmp_path) == second


def test_what_a_mac_and_a_tidied_disk_leave_beside_checkpoints_is_passed_over(tmp_path):
    """AppleDouble files and a link into a folder that is gone, named as the newest would be; links that hold are followed."""
    newest = complete_folder(tmp_path, "iter_0000200")
    old = complete_folder(tmp_path, "iter_0000100")
    for name in (".DS_Store", "._iter_0000200", "._latest", "iter_0000200/._common.pt"):
        (tmp_path / name).write_bytes(b"\0\5\26\7")
    (tmp_path / "iter_0000300").symlink_to(tmp_path / "gone")
    assert find_latest(tmp_path, set_aside=True) == newest
    (tmp_path / "latest").write_text("iter_0000200\n")
    assert find_latest(tmp_path, set_aside=True) == newest
    remove_old(tmp_path, keep=1, keep_every=0)
    assert newest.is_dir() and not old.exists() and (tmp_path / ".DS_Store").exists()


def test_old_checkpoints_go_but_never_the_latest_nor_every_nth(tmp_path):
    for iteration in (100, 200, 300, 400, 500):
        complete_folder(tmp_path, f"iter_{iteration:07d}")
    (tmp_path / "latest").write_text("iter_0000100\n")
    remove_old(tmp_path, keep=2, keep_every=200)
    kept = ["iter_0000100", "iter_0000200", "iter_0000400", "iter_0000500", "latest"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    remove_old(tmp_path, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000100", "iter_0000500", "latest"]


def test_every_byte_is_on_disk_before_a_checkpoint_has_its_name_and_latest_comes_last(tmp_path, monkeypatch):
    """What a machine that loses its power leaves: a name says that the bytes are there."""
    partial, root, steps, rename = complete_folder(tmp_path, "iter_0000100.tmp"), tmp_path.name, [], Path.rename

    def renamed(path, target):
        steps.append(f"{path.name} -> {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", lambda file: steps.append(Path(os.readlink(f"/proc/self/fd/{file}")).name))
    monkeypatch.setattr(Path, "rename", renamed)
    publish(partial, tmp_path / "iter_0000100")
    assert sorted(steps[:4]) == [".metadata", "__0_0.distcp", "common.pt", "files.json"]
    pointer = steps[-3]
    assert pointer.startswith(".latest.")
    naming = ["iter_0000100.tmp", "iter_0000100.tmp -> iter_0000100", pointer, f"{pointer} -> latest", root]
    assert steps[4:] == naming


# ---- damage


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("file", ["__0_0.distcp", "common.pt", "files.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, caplog, file, harm):
    good, bad = complete_folder(tmp_path, "iter_0000100"), complete_folder(tmp_path, "iter_0000200")
    (tmp_path / "latest").write_text("iter_0000200\n")
    harm(bad / file)
    with caplog.at_level(logging.WARNING):
        assert find_latest(tmp_path) == good
    assert f"DAMAGED CHECKPOINT {bad}: {file}: " in caplog.text and "100 iterations are lost" in caplog.text
    assert bad.is_dir() and (tmp_path / "latest").read_text() == "iter_0000200\n", "only looked at"
    assert find_latest(tmp_path, set_aside=True) == good
    assert not bad.exists() and (tmp_path / "iter_0000200.damaged").is_dir()
    assert (tmp_path / "latest").read_text() == "iter_0000100\n"


def test_sizes_alone_are_compared_where_checksums_are_not_asked_for(tmp_path):
    good, bad = complete_folder(tmp_path, "iter_0000100"), complete_folder(tmp_path, "iter_0000200")
    flip_a_bit(bad / "common.pt")
    assert find_latest(tmp_path, checksums=False) == bad
    truncate(bad / "common.pt")
    assert find_latest(tmp_path, checksums=False) == good


def test_no_good_checkpoint_is_an_error_and_never_a_silent_start(tmp_path):
    for iteration in (100, 200):
        truncate(complete_folder(tmp_path, f"iter_{iteration:07d}") / ".metadata")
    with pytest.raises(CheckpointError, match=r"got 2 damaged checkpoints .*\n  iter_0000200: .metadata: got 12 bytes"):
        find_latest(tmp_path, set_aside=True)
    assert len(list(tmp_path.glob("iter_*.damaged"))) == 0


def test_a_file_shorter_than_what_was_written_stops_the_publishing(tmp_path):
    folder = complete_folder(tmp_path, "iter_0000100.tmp")
    entries = json.loads((folder / "files.json").read_text())["files"]
    truncate(folder / "common.pt")
    with pytest.raises(OSError, match=r"common.pt: got 14 bytes on disk; need the 29"):
        write_manifest(folder, entries)


def error_where_one_rank_sees_damage(root):
    """What this rank raises where only the last rank's disk has the damage."""
    if dist.get_rank() == dist.get_world_size() - 1:
        from rcm_megatron.checkpoint import integrity

        integrity.file_crc32 = lambda path: 0
    with pytest.raises(CheckpointError) as caught:
        find_latest(root)
    return str(caught.value)


def test_all_ranks_agree_when_one_sees_damage(tmp_path):
    complete_folder(tmp_path, "iter_0000100")
    errors = run_ranks(error_where_one_rank_sees_damage, 3, str(tmp_path))
    assert len(set(errors)) == 1 and "got CRC-32 00000000" in errors[0]
