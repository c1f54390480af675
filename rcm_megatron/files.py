"""Files as `open` would make them, with the mode that the umask says, where a library makes them private to their owner."""

from __future__ import annotations

import os
import stat
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from torch import Tensor


def save_safetensors(tensors: dict[str, Tensor], path: Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file. ``safetensors`` 0.8 itself makes it 0600, whatever the umask."""
    from safetensors.torch import save_file

    path.touch()  # by the umask, and by the folder's default ACL, which no arithmetic with the umask knows
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(tensors, path, metadata=None if metadata is None else dict(metadata))
    path.chmod(mode)


def write_atomically(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """A file of ``content``, or of what it writes, on disk before it takes the place of the one before; or that one, untouched.

    For whatever is one file and written at once. Raises OSError, and what ``content`` raises. Folders, which appear whole too, are renamed
    by `checkpoint.writers.replaced_when_done`, `checkpoint.folders.publish` and `datasets.build`."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # tempfile's are 0600
    try:
        with temporary.open("xb") as file:
            file.write(content) if isinstance(content, bytes) else content(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
