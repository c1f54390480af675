"""Every function of the kernels says what it takes and gives, but those that Triton compiles: it reads their annotations itself."""

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels" / "rcm_kernels"


def untyped(source):
    """Names of functions whose arguments or result have no type."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef):
            continue
        if any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list):
            continue
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        arguments += [extra for extra in (node.args.vararg, node.args.kwarg) if extra is not None]
        missing = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
        if missing or node.returns is None:
            yield f"line {node.lineno}, {node.name}: {', '.join(missing) or 'its result'}"


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda path: str(path.relative_to(KERNELS)))
def test_functions_have_types(path):
    assert list(untyped(path.read_text())) == []


def test_an_argument_or_a_result_without_a_type_is_found():
    assert list(untyped("def f(a: int, *b) -> int: ...")) == ["line 1, f: b"]
    assert list(untyped("def f(*, a: int): ...")) == ["line 1, f: its result"]
    for decorator in ("triton.jit", "triton.jit(do_not_specialize=['a'])"):
        assert list(untyped(f"@{decorator}\ndef f(a, B: tl.constexpr): ...")) == []
