"""The Dockerfile as far as it can be checked without an engine: a linter, its pins, its scripts, and what it copies."""

import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "Dockerfile").read_text()
SCRIPT = re.search(r"RUN python <<'PY'\n(.*?)\nPY\n", TEXT, re.DOTALL)[1]
BASE = """\
torch==2.13.0a0+9186a08b2c.nv26.7
triton==3.7.1
numpy==2.1.3
nvidia_dali_cuda130==2.1.0
PyYAML==6.0.2
"""


def instructions():
    """(name, arguments) of each instruction; continued lines joined, comments and here-documents left out."""
    lines = re.sub(r"(<<'PY')\n.*?\nPY\n", r"\1\n", TEXT, flags=re.DOTALL).splitlines()
    joined = "\n".join(line for line in lines if not line.startswith("#")).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def of(name):
    return [arguments for instruction, arguments in instructions() if instruction == name]


def test_hadolint_finds_nothing():
    linter = shutil.which("hadolint") or shutil.which("hadolint", path=Path(sys.executable).parent)
    assert linter, "hadolint is in requirements.txt"
    done = subprocess.run([linter, "--no-color", str(ROOT / "Dockerfile")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_base_and_apex_are_pinned_by_content():
    (base,) = of("FROM")
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3@sha256:[0-9a-f]{64}", base), base
    (commit,) = [value for value in of("ARG") if value.startswith("APEX_")]
    assert re.fullmatch(r"APEX_COMMIT=[0-9a-f]{40}", commit)
    assert not re.search(r":latest\b|@main\b|@master\b", TEXT)


def test_apex_is_built_from_source():
    """PyPI's package of that name is another project: no requirement may name it, and pip is given a folder."""
    assert not re.search(r"^apex\b", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    installs = re.findall(r"pip install (.*?)(?: &&|$)", "\n".join(of("RUN")), re.MULTILINE)
    sources = [[word for word in install.split() if not word.startswith("-")] for install in installs]
    assert sources == [["/tmp/apex"], ["/tmp/requirements.txt"], ["."]]
    assert "https://github.com/NVIDIA/apex.git" in TEXT


def test_every_requirement_is_pinned():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    requirements = [line for line in lines if line and not line.startswith("#")]
    assert len(requirements) > 15
    for line in requirements:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][^; ]*(; .+)?", line), (
            f"{line}: the Dockerfile reads lower case names and =="
        )


def test_the_image_ends_as_a_user_without_rights():
    (user,) = of("USER")
    assert int(user) > 0 and instructions()[-1] == ("USER", user) and f"useradd --create-home --uid {user} rcm" in TEXT


def run_pipeline(tmp_path, command):
    """A RUN command in the shell of the image, with the folders of the image in `tmp_path`; installing is left out."""
    (shell,) = of("SHELL")
    assert shell == '["/bin/bash", "-o", "pipefail", "-c"]'
    command = re.sub(r"/(opt|tmp)/", rf"{tmp_path}/\1/", command)
    stub = tmp_path / "bin" / "python"
    stub.parent.mkdir(exist_ok=True)
    stub.write_text(f'#!/bin/sh\n[ "$3" = list ] && cat {tmp_path}/freeze || true\n')
    stub.chmod(0o755)
    environment = {"PATH": f"{stub.parent}:/usr/bin:/bin"}
    shell = ["/bin/bash", "-o", "pipefail", "-c", command]
    return subprocess.run(shell, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def image(tmp_path):
    for name in ("opt", "tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "freeze").write_text(BASE + "localthing @ file:///build/localthing\n")
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    return tmp_path


def run_commands():
    constraints, _, requirements, *_ = of("RUN")
    return constraints, requirements


def test_the_base_packages_become_constraints_and_leave_our_pins(image):
    constraints, requirements = run_commands()
    done = run_pipeline(image, constraints)
    assert done.returncode == 0, done.stderr
    assert (image / "opt" / "base-constraints.txt").read_text() == BASE
    done = run_pipeline(image, requirements)
    assert done.returncode == 0, done.stderr
    kept = (image / "tmp" / "requirements.txt").read_text().splitlines()
    pins = [line for line in (image / "requirements.txt").read_text().splitlines() if re.match("[a-z]", line)]
    from_base = ("torch==", "triton==", "numpy==", "nvidia-dali-cuda130==", "pyyaml==")
    assert kept == [line for line in pins if not line.startswith(from_base)]
    assert len(pins) - len(kept) == len(from_base)


def test_a_base_without_torch_ends_the_build(image):
    (image / "freeze").write_text("numpy==2.1.3\n")
    assert run_pipeline(image, run_commands()[0]).returncode != 0


def test_the_check_of_the_image_is_a_program():
    compile(SCRIPT, "Dockerfile", "exec")
    pin = r'^megatron-core==(\S+); python_version >= "3.12"$'  # of the base's Python
    version = re.search(pin, (ROOT / "requirements.txt").read_text(), re.MULTILINE)[1]
    assert f'metadata.version("megatron-core") == "{version}"' in SCRIPT


# ---- what is copied


def tracked():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.splitlines()


def ignored(path):
    """Docker's rules, as far as .dockerignore uses them: a pattern names a path or a folder above it, `**/` any depth, none included."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    parts = path.split("/")
    above = ["/".join(parts[: end + 1]) for end in range(len(parts))]
    return any(matches(pattern, candidate) for pattern in patterns for candidate in above)


def matches(pattern, path):
    if pattern.startswith("**/"):
        return fnmatch(path.rsplit("/", 1)[-1], pattern[3:])
    return pattern.count("/") == path.count("/") and fnmatch(path, pattern)


def test_copied_files_exist():
    sources = [source for arguments in of("COPY") for source in arguments.split()[:-1]]
    assert sources == ["requirements.txt", "."] and all((ROOT / source).exists() for source in sources)


def test_dockerignore_leaves_out_what_is_no_source_and_nothing_else():
    for path in (".git/HEAD", ".venv/bin/python", "runs/quickstart/metrics.jsonl", "rcm_megatron/__pycache__/a.pyc"):
        assert ignored(path), path
    for line in (ROOT / ".gitignore").read_text().splitlines():
        example = line.rstrip("/").replace("*", "x")
        assert ignored(example), f"{line} of .gitignore"
    files = tracked()
    if not files:
        pytest.skip("no git history here")
    assert not [path for path in files if ignored(path)]
