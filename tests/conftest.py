"""What all tests share: one thread per process, nothing sent anywhere, GPU tests skipped where there is no GPU."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")


def pytest_addoption(parser: pytest.Parser) -> None:
    help_text = "compare all legal layouts of at most 8 processes with one rank, not the covering selection alone"
    parser.addoption("--all-layouts", action="store_true", help=help_text)


def pytest_report_header(config: pytest.Config) -> str | None:
    """How many layouts `--all-layouts` means."""
    if not config.getoption("--all-layouts"):
        return None
    from tests.distributed.layouts import ALL, SELECTED

    return f"layouts: all {len(ALL)} legal ones (CI's selection: {len(SELECTED)})"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` on a machine without CUDA; torch is imported only if there are any."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
