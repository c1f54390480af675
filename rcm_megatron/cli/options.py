"""Options of a command from the fields of its request dataclass: name, type, default and docstring of each, and its `Option`.

argparse rather than a library (tyro imports in 0.2 s, as long as everything else that `rcm check` does), and because KEY=VALUE
overrides may stand anywhere on the line.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import textwrap
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from rcm_megatron.paths import path_argument
from rcm_megatron.requests import Option

T = TypeVar("T")


def add_options(parser: argparse.ArgumentParser, request: type) -> None:
    """An option or positional argument for every field of the dataclass ``request``."""
    hints, helps = get_type_hints(request, include_extras=True), field_docstrings(request)
    for field in dataclasses.fields(request):
        hint, option = _split(hints[field.name])
        keywords = _typed(hint, option)
        if option.positional:
            names = [field.name]
            if keywords.pop("action", None):
                keywords["nargs"] = "+" if _is_required(field) else "*"
                keywords["default"] = None if _is_required(field) else ()
        else:
            names = [option.flag or f"--{field.name.replace('_', '-')}"]
            keywords |= {"dest": field.name, "required": _is_required(field)}
            if not _is_required(field):
                keywords["default"] = field.default
        parser.add_argument(*names, help=_help(helps.get(field.name, ""), field, option), **keywords)


def to_request(request: type[T], arguments: argparse.Namespace) -> T:
    """The request that was parsed."""
    values = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(request)}
    return request(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def field_docstrings(cls: type) -> Mapping[str, str]:
    """Text under each field of a class and its bases, on one line."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def _split(hint: Any) -> tuple[Any, Option]:
    """A field's type without null, and its `Option`."""
    option = Option()
    if get_origin(hint) is Annotated:
        hint, option = hint.__origin__, hint.__metadata__[0]
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (inner for inner in get_args(hint) if inner is not type(None))
    return hint, option


def _typed(hint: Any, option: Option) -> dict[str, Any]:
    """argparse's keywords for a type."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is bool:
        return {"action": "store_true"}
    item = inner[0] if inner else hint
    metavar = option.metavar or {int: "N", float: "X", Path: "PATH", str: "TEXT"}.get(item)
    keywords: dict[str, Any] = {} if metavar is None or (option.positional and not inner) else {"metavar": metavar}
    if option.parse is not None:
        return keywords | {"type": _parser(option)}
    if option.choices is not None or origin is Literal:
        return {"choices": option.choices or inner}
    read = path_argument if item is Path else item
    if origin is tuple:
        return keywords | {"type": read, "nargs": len(inner)}
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return keywords | {"type": read, "action": _Append}
    return keywords | {"type": read}


class _Append(argparse.Action):
    """argparse's own "append" would write into the default."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, value: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, (*getattr(namespace, self.dest), value))


def _parser(option: Option) -> Any:
    def parse(text: str) -> Any:
        try:
            return option.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def _help(text: str, field: dataclasses.Field[Any], option: Option) -> str:
    text = text.replace("null:", "default:").replace("%", "%%")
    shows = not _is_required(field) and field.default not in (None, False, (), "") and not option.parse
    default = f"default: {field.default}" if shows else ""
    return "; ".join(part for part in (text, default) if part)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING
