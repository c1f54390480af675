"""Every file and folder that a run, a dataset, an export and a conversion leave behind has the mode that the umask says."""

import os

import pytest

from rcm_megatron.files import save_safetensors, write_atomically
from tests.distributed.harness import run_ranks
from tests.distributed.tiny_run import command, train, write_tiny_run


@pytest.fixture
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def wrong_modes(folder, umask):
    """Paths below `folder` whose mode is not that of an ordinary file or folder."""
    found = {}
    for path in folder.rglob("*"):
        need = (0o777 if path.is_dir() else 0o666) & ~umask
        if path.stat().st_mode & 0o777 != need:
            found[str(path.relative_to(folder))] = f"{path.stat().st_mode & 0o777:03o}, need {need:03o}"
    return found


def commands(config, folder):
    """What is made of a run."""
    sampled = ["--weights", "teacher", "--steps", "1", "--prompt", "one moving up", "--output", str(folder / "samples")]
    yield ["sample", str(config), *sampled]
    yield ["export", str(config), "--weights", "student", "--output", str(folder / "exported"), "--dtype", "bf16"]
    yield ["convert", str(folder / "exported"), str(folder / "student.safetensors"), "--to", "nvlabs"]
    yield ["convert", str(folder / "exported"), str(folder / "internal"), "--to", "internal"]


@pytest.mark.parametrize("umask", [0o027, 0o002], indirect=True, ids=oct)
def test_a_run_and_what_is_made_of_it(tmp_path, umask):
    config = write_tiny_run(tmp_path)
    run_ranks(train, 1, str(config), ["trainer.checkpoint_every=1", "trainer.stop_after=2", "trainer.sample_every=2"])
    for argv in commands(config, tmp_path):  # each on a rank, which has this process' umask
        ((status, stderr),) = run_ranks(command, 1, argv)
        assert status == 0, (argv, stderr)
    names = {path.name for path in tmp_path.rglob("*")}
    assert {"metrics.jsonl", "latest", "files.json", "manifest.json", "student.safetensors"} <= names
    assert any(name.endswith(".mp4") for name in names)
    assert wrong_modes(tmp_path, umask) == {}


@pytest.mark.parametrize("umask", [0o000, 0o077], indirect=True, ids=oct)
def test_files_that_libraries_make_private(tmp_path, umask):
    import torch

    save_safetensors({"a": torch.zeros(3)}, tmp_path / "a.safetensors", metadata={"b": "c"})
    write_atomically(tmp_path / "text", lambda file: file.write(b"first"))
    write_atomically(tmp_path / "text", lambda file: file.write(b"second"))
    assert wrong_modes(tmp_path, umask) == {} and (tmp_path / "text").read_bytes() == b"second"


def test_a_write_that_fails_leaves_the_file_before_it(tmp_path):
    (tmp_path / "text").write_text("before")

    def full(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "text", full)
    assert [path.name for path in tmp_path.iterdir()] == ["text"] and (tmp_path / "text").read_text() == "before"
