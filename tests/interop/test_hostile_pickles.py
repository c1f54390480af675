"""Checkpoints whose pickles would run code, unpack a thousandfold or were written by another Python."""

import io
import os
import pickle
import re
import shutil
import subprocess
import zipfile

import pytest
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, StorageMeta

from tests.interop.damaged import copy, outcome


class Call:
    """Unpickling it calls a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class Called(Call):
    """A call whose result is called in turn."""

    def __call__(self):
        raise AssertionError("only what pickle makes of it is called")


def through_globals(trace):
    """os.mkdir by getattr alone: of a type of `.metadata`, its constructor's globals, the os that they hold."""
    constructor_globals = Call(getattr, Call(getattr, Metadata, "__init__"), "__globals__")
    imported_os = Call(Called(getattr, constructor_globals, "__getitem__"), "os")
    return pickle.dumps(Call(Called(getattr, imported_os, "mkdir"), trace))


def dotted(module, name, argument):
    """A pickle that calls `module.name(argument)`, where `name` reaches through what the module has imported."""
    pushed = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    return b"\x80\x04" + pushed + b"\x93" + b"\x8c" + bytes([len(argument)]) + argument.encode() + b"\x85R."


def bombs(trace):
    """Pickles that make the folder `trace` when they are unpickled without care."""
    metadata = "torch.distributed.checkpoint.metadata"
    return {
        "mkdir": pickle.dumps({"x": Call(os.mkdir, trace)}),
        "eval": pickle.dumps(Call(eval, f"__import__('os').mkdir({trace!r})")),
        "exec": pickle.dumps(Call(exec, f"import os; os.mkdir({trace!r})")),
        "shell": pickle.dumps(Call(os.system, f"mkdir {trace}")),
        "protocol 0": pickle.dumps(Call(os.mkdir, trace), protocol=0),
        "process": pickle.dumps(Call(subprocess.call, ["mkdir", trace])),
        "through an import": dotted(metadata, "os.mkdir", trace),
        "through torch": dotted("torch", "os.mkdir", trace),
        "through getattr": through_globals(trace),
        "through a type": dotted("torch.serialization", "os.mkdir", trace),
    }


def test_the_bombs_are_live(tmp_path):
    """Without care each of them does what it says, so that the tests below can fail."""
    for name, bomb in bombs(str(tmp_path / "t")).items():
        pickle.loads(bomb)
        assert (tmp_path / "t").is_dir(), name
        (tmp_path / "t").rmdir()


def inside_archive(path, bomb):
    """Replace the pickle inside a file of torch.save's."""
    content = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(content, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, bomb if info.filename.endswith("data.pkl") else old.read(info))
    path.write_bytes(content.getvalue())


@pytest.mark.parametrize("place", ["plain.pt", "plain.pth", "rcm.pt", ".metadata", "common.pt", "data"])
def test_code_in_pickles_never_runs(sources, tmp_path, place):
    trace = tmp_path / "t"
    for name, bomb in bombs(str(trace)).items():
        source = tmp_path / ("dist" if place in (".metadata", "common.pt", "data") else place)
        if source.suffix:
            source.write_bytes(bomb)
            if place == "rcm.pt":
                copy(sources / place, source)
                inside_archive(source, bomb)
        else:
            copy(sources / "dist", source)
            hostile_dist(source, place, bomb)
        message = outcome(source, tmp_path / "out")
        assert not trace.exists(), name
        if place == "common.pt":
            assert message is None, "it is not read"
        else:
            assert "refused" in message, name
        shutil.rmtree(source) if source.is_dir() else source.unlink()


class AttributePickler(pickle.Pickler):
    """Pickles members of enums as Python 3.11.0 to 3.11.3 do, Debian 12's among them."""

    def reducer_override(self, value):
        return (getattr, (type(value), value.name)) if isinstance(value, _MEM_FORMAT_ENCODING) else NotImplemented


def test_metadata_of_an_early_python_3_11_is_read(sources, tmp_path):
    path = tmp_path / "dist" / ".metadata"
    copy(sources / "dist", path.parent)
    with path.open("rb") as file:
        metadata = pickle.load(file)
    with path.open("wb") as file:
        AttributePickler(file).dump(metadata)
    assert b"getattr" in path.read_bytes()
    assert outcome(path.parent, tmp_path / "out") is None


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_metadata_with_a_path_is_read_whatever_the_python(sources, tmp_path, module):
    """A run's `.metadata` holds the path it was written to; Python 3.13 calls the type pathlib._local.PosixPath."""
    path = tmp_path / "dist" / ".metadata"
    copy(sources / "dist", path.parent)
    with path.open("rb") as file:
        metadata = pickle.load(file)
    metadata.storage_meta = StorageMeta(checkpoint_id=tmp_path)
    content = pickle.dumps(metadata, protocol=3)  # which names modules in plain text
    content, count = re.subn(rb"cpathlib(\._local)?\n", b"c" + module.encode() + b"\n", content)
    assert count == 1
    path.write_bytes(content)
    assert outcome(path.parent, tmp_path / "out") is None


def hostile_dist(folder, place, bomb):
    """A bomb as a file of a torch_dist folder, or as a tensor inside one, at the place that .metadata gives for it."""
    if place != "data":
        (folder / place).write_bytes(bomb)
        return
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    info = next(
        info for index, info in metadata.storage_data.items() if index.fqn == "network.model.patch_embedding.weight"
    )
    path = folder / info.relative_path
    content = bytearray(path.read_bytes())
    content[info.offset : info.offset + len(bomb)] = bomb
    path.write_bytes(content)


def test_a_compressed_archive_is_not_unpacked(sources, tmp_path):
    """A thousandfold: 64 MiB of zeros in 64 KiB."""
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(sources / "rcm.pt") as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, bytes(2**26) if info.filename.endswith("data.pkl") else old.read(info))
    assert path.stat().st_size < 2**18
    assert "is compressed, which torch.save does not do" in outcome(path, tmp_path / "out")
