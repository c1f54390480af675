"""Comments stand above what they are about: the formatter leaves those of a line that it breaks behind its closing bracket."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ORPHAN = re.compile(r"^\s*[])}]+[,:]?( -> .*)?\s+# (?!fmt:|noqa|type:)")


def orphans(text):
    return [number for number, line in enumerate(text.splitlines(), start=1) if ORPHAN.match(line)]


@pytest.mark.parametrize("folder", ["rcm_megatron", "kernels", "tools", "tests"])
def test_no_comment_follows_a_closing_bracket(folder):
    found = {str(path.relative_to(ROOT)): orphans(path.read_text()) for path in (ROOT / folder).rglob("*.py")}
    assert not {path: lines for path, lines in found.items() if lines}, "move the comment above its statement"


def test_such_a_comment_is_found():
    assert orphans("f(\n    a\n)  # why\n") == [3]
    assert orphans("f(a)  # why\ng(\n    a\n)  # fmt: skip\n") == []
