"""What a conversion of a damaged checkpoint says and leaves behind."""

import hashlib
import shutil

import torch

from rcm_megatron.checkpoint.sources import open_checkpoint
from rcm_megatron.errors import CheckpointError
from tests.interop.conversion import convert


def copy(source, target):
    return shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)


def digest(path):
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def outcome(source, target):
    """The message of the CheckpointError, or None for a conversion; no trace is left of a failed one, and none on the source."""
    before = digest(source)
    try:
        fields = {"num_heads": 4} if source.is_file() else {}
        convert(source, target, to="internal", **fields)
    except CheckpointError as error:
        message = str(error)
        assert source.name in message, message
        assert not target.exists()
    else:
        message = None
        assert {tensor.dtype for tensor in open_checkpoint(target).values()} <= {
            torch.float32,
            torch.float16,
            torch.float64,
        }
        shutil.rmtree(target)
    assert not [path for path in target.parent.iterdir() if "incomplete" in path.name]
    assert digest(source) == before
    return message
