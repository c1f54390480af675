"""What the program runs on: the device and its backend, and Megatron-Core, whose version is checked and which is patched on the CPU."""

import sys

MEGATRON_VERSION = "0.16.1" if sys.version_info < (3, 12) else "0.19.2"
"""The one that goes with this Python, as in requirements.txt: the newest release, and the last one for Python 3.11."""


def released(version: str) -> str:
    """``version`` without its local part: megatron-core 0.19.2 in an environment under a git checkout calls itself 0.19.2+ that commit."""
    return version.partition("+")[0]
