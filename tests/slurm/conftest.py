"""One SLURM for all tests of a session."""

import shutil
import tempfile
import warnings
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, why_not


@pytest.fixture(scope="session")
def slurm():
    reason = why_not()
    if reason is not None:
        warnings.warn(f"NO SLURM TEST RUNS HERE: {reason}", stacklevel=1)
        pytest.skip(f"SLURM: {reason}")
    folder = Path(tempfile.mkdtemp(prefix="slurm_"))  # pytest's own folder is closed to others, which munged refuses
    folder.chmod(0o755)
    with Cluster(folder) as cluster:
        yield cluster
    shutil.rmtree(folder)
