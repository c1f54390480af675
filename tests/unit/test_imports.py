"""Imports point one way (lower parts know nothing of higher ones): read from the source with ast, nothing is imported here."""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "rcm_megatron"
TOOLS = ROOT / "tools"
KERNELS = ROOT / "kernels" / "rcm_kernels"

MODELS = {"errors", "files", "finite", "config", "dtypes", "dual", "inputs", "parallel", "models", "rcm_kernels"}
ALLOWED = {
    "errors": set(),
    "text": {"errors"},
    "paths": {"errors"},
    "registry": {"errors"},
    "registries": {"registry", "config", "families", "objectives", "checkpoint"},
    "config": {"config", "errors", "paths", "registries", "text"},
    "requests": {"registries"},
    "dtypes": set(),
    "files": set(),
    "progress": set(),
    "finite": {"errors"},
    "dual": set(),
    "inputs": {"dual"},
    "families": MODELS | {"registry", "families"},
    "platform": {"errors", "platform"},
    "cluster": {"errors", "config", "platform", "requests", "cluster"},
    "diffusion": {"diffusion"},
    "objectives": MODELS | {"registries", "diffusion", "networks", "objectives"},
    "data": {"errors", "files", "finite", "text", "data"},
    "parallel": {"config", "dual", "inputs", "platform", "parallel", "rcm_kernels"},
    "models": MODELS,
    "checkpoint": MODELS | {"families", "registries", "requests", "platform", "checkpoint", "__version__"},
    "runtime": {"errors", "config", "platform", "parallel", "runtime"},
    "networks": MODELS | {"registries", "platform", "checkpoint", "diffusion", "networks"},
    "inference": MODELS
    | {
        "registries",
        "requests",
        "platform",
        "checkpoint",
        "networks",
        "diffusion",
        "data",
        "runtime",
        "inference",
        "__version__",
    },
    "datasets": MODELS
    | {"files", "progress", "text", "requests", "platform", "checkpoint", "data", "inference", "datasets"}
    | {"__version__"},
    "training": MODELS
    | {
        "registries",
        "platform",
        "checkpoint",
        "networks",
        "objectives",
        "diffusion",
        "data",
        "runtime",
        "inference",
        "training",
        "__version__",
    },
    "conformance": MODELS
    | {
        "families",
        "platform",
        "requests",
        "checkpoint",
        "networks",
        "objectives",
        "diffusion",
        "training",
        "conformance",
    },
    "dryrun": MODELS
    | {
        "platform",
        "networks",
        "data",
        "objectives",
        "runtime",
        "training",
        "requests",
        "reports",
        "dryrun",
        "registries",
    },
    "planner": MODELS
    | {
        "registries",
        "networks",
        "checkpoint",
        "objectives",
        "training",
        "requests",
        "reports",
        "dryrun",
        "planner",
        "text",
    },
    "reports": {"errors", "registries", "requests", "reports"},
    "evaluation": {
        "errors",
        "config",
        "files",
        "finite",
        "progress",
        "text",
        "requests",
        "platform",
        "parallel",
        "models",
    }
    | {"diffusion", "data", "inference", "reports", "evaluation"},
    "cli": {"errors", "config", "paths", "requests", "cli"}
    | {
        "checkpoint",
        "cluster",
        "conformance",
        "datasets",
        "dryrun",
        "evaluation",
        "inference",
        "planner",
        "reports",
        "training",
    },
}
"""Part of the program -> the parts it may import. cli imports the last nine when a command runs; `registries` names four for types."""

EXTERNAL = {
    "config": {"yaml"},
    "dual": {"torch"},
    "diffusion": {"torch", "diffusers"},
    "rcm_kernels": {"torch", "triton", "flash_attn", "flash_attn_interface"},
}
"""Parts that are kept to these libraries, beside Python's own."""


def imported_names(path: Path, *, types: bool = True) -> Iterator[tuple[str, int]]:
    """(absolute dotted name, line) of every import in a file, also inside functions; ``types``: also under TYPE_CHECKING."""
    tree = ast.parse(path.read_text())
    named = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    skipped = set() if types else {inner for node in named for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the full name"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def sources() -> list[tuple[str, Path]]:
    """(part, file) of the program. A part is a module or subpackage of rcm_megatron, or rcm_kernels."""
    found = [("rcm_kernels", path) for path in KERNELS.rglob("*.py")]
    for path in PACKAGE.rglob("*.py"):
        found.append((path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path))
    return sorted(found)


def part_of(name: str) -> str | None:
    """The part of our program that an imported name belongs to, or None."""
    head, _, rest = name.partition(".")
    if head == "rcm_kernels":
        return head
    return rest.split(".")[0] if head == "rcm_megatron" else None


def test_every_part_has_a_rule():
    parts = {part for part, _ in sources()}
    assert {"config", "dual", "diffusion", "parallel", "models", "rcm_kernels"} <= parts
    assert parts - ALLOWED.keys() <= {"__init__", "__main__", "rcm_kernels"}


@pytest.mark.parametrize("part", [*ALLOWED, "rcm_kernels", "__init__"])
def test_our_imports_point_one_way(part):
    allowed = ALLOWED.get(part, {part} if part == "rcm_kernels" else set())
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for owner, path in sources()
        if owner == part
        for name, line in imported_names(path)
        if part_of(name) not in (None, *allowed)
    ]
    assert not wrong, f"{part} may import {sorted(allowed) or 'nothing of ours'}:\n" + "\n".join(wrong)


def test_no_parts_import_each_other():
    """Not by way of others either. What types alone name is left out, and so is what a registry imports when it is asked for it."""
    order = TopologicalSorter()
    for part, path in sources():
        order.add(part, *({part_of(name) for name, _ in imported_names(path, types=False)} - {None, part}))
    order.prepare()  # raises CycleError, which names the parts


@pytest.mark.parametrize("part", EXTERNAL)
def test_libraries_of_the_lower_parts(part):
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for owner, path in sources()
        if owner == part
        for name, line in imported_names(path)
        if part_of(name) is None and name.split(".")[0] not in EXTERNAL[part] | sys.stdlib_module_names
    ]
    assert not wrong, f"{part} may import {sorted(EXTERNAL[part])}:\n" + "\n".join(wrong)


def test_megatron_core_only():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for _, path in sources()
        for name, line in imported_names(path)
        if name.split(".")[0] == "megatron" and not name.startswith("megatron.core")
    ]
    assert not wrong, "\n".join(wrong)


def test_kernels_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would hide PyPI's `kernels`, which transformers imports"


@pytest.mark.parametrize("tool", sorted(TOOLS.glob("*.py")), ids=lambda path: path.stem)
def test_a_tool_runs_as_a_script(tool):
    """Of the repository Python puts tools/ alone on a script's path; the program itself is installed."""
    text = tool.read_text()
    if "__main__" not in text:
        return
    found = [line for name, line in imported_names(tool) if name.split(".")[0] == "tools"]
    ready = text[: text.find("sys.path")].count("\n") + 1 if "sys.path" in text else None
    assert not found or (ready is not None and ready < min(found)), f"{tool.name} imports tools. at line {min(found)}"
