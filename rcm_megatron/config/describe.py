"""Values, types and keys of a configuration in the words of its error messages."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from rcm_megatron.config.declare import Bounds, ByName, Variants
from rcm_megatron.config.yaml_text import Spelled, SpelledBool, value_of


def join(path: str, name: str) -> str:
    """Dotted path of ``name`` in the section at ``path``."""
    return f"{path}.{name}" if path else name


def plain(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A declared type without its annotations, and the annotations."""
    return (hint.__origin__, hint.__metadata__) if get_origin(hint) is Annotated else (hint, ())


def describe(value: Any) -> str:
    """`3 (an integer)`."""
    names = {dict: "a mapping", list: "a list", str: "text", int: "an integer", float: "a number", bool: "true/false"}
    if value is None:
        return "null"
    if isinstance(value, Spelled):
        meaning = describe(value_of(value))
        plainly = type(value) is SpelledBool and value.text.lower() in ("true", "false")
        same = plainly or meaning.startswith(f"{value.text.removeprefix('.') if 'n' in value.text else value.text} ")
        return meaning if same else f"{value.text} (in YAML {meaning.replace(' (', ', ').removesuffix(')')})"
    shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}..."
    return f"{shown} ({names.get(type(value), type(value).__name__)})"


def type_name(hint: Any, bounds: Sequence[Bounds] = ()) -> str:
    """`an integer greater than 0`."""
    hint, notes = plain(hint)
    limits = " ".join(f" {note}" for note in (*bounds, *notes) if isinstance(note, Bounds))
    origin, inner = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        required = [field.name for field in dataclasses.fields(hint) if _is_required(field)]
        return f"a mapping with {', '.join(required)}" if required else "a mapping"
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return " or ".join("null" if option is type(None) else type_name(option) for option in inner)
    if origin is tuple:
        count = "a list" if inner[-1] is Ellipsis else f"a list of {len(inner)}"
        return f"{count}{limits}, each {type_name(inner[0])}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a mapping of names"
    return {int: "an integer", float: "a finite number", str: "text", bool: "true or false"}[hint] + limits


def hint_for(value: Any, hint: Any, path: str = "") -> str:
    """What was probably meant, as the end of a sentence; or nothing. ``path``: where ``value`` stands."""
    typed, value = value, value_of(value)
    if hint is str:
        return _quoted(typed, path)
    text = typed.text if isinstance(typed, Spelled) else value if isinstance(value, str) else ""
    if (number := _number(text)) is not None and hint in (int, float) and hint(number) == number:
        return f"; write {hint(number)}"
    if hint is bool and text.lower() in _TRUTH:
        return f"; write {_TRUTH[text.lower()]}"
    if get_origin(hint) is Literal and (near := difflib.get_close_matches(str(value), map(str, get_args(hint)), n=1)):
        return f"; did you mean {near[0]}?"
    if hint is int and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    return ""


_TRUTH = dict.fromkeys(("yes", "on", "y", "true"), "true") | dict.fromkeys(("no", "off", "n", "false"), "false")


def _quoted(value: Any, path: str) -> str:
    """How to write what YAML reads as something else as text; in a shell it takes quotes around quotes."""
    text = value.text if isinstance(value, Spelled) else str(value) if isinstance(value, int | float) else None
    if text is not None and getattr(value, "shell", False):
        return f"; put it in quotes, and the quotes in quotes for the shell: \"{path}='{text}'\""
    if text is not None:
        return f"; put it in quotes: '{text}'"
    return "; text that YAML reads as something else goes in quotes"


def _number(text: str) -> float | int | None:
    """What a person means by digits with leading zeros or underscores; None for other text."""
    plain_text = text.replace("_", "")
    if re.fullmatch(r"[-+]?\d+", plain_text):
        return int(plain_text)
    return float(plain_text) if re.fullmatch(r"[-+]?\d*\.\d+", plain_text) else None


def missing_key(path: str, hint: Any) -> str:
    """The message for a required key that is not there."""
    return f"{path}: got nothing, need {type_name(hint)}; add it to the configuration"


def unknown_key(owner: type | Sequence[str], key: str, path: str, root: type) -> str:
    """Names the nearest key of ``owner`` (a dataclass or its keys), else one of that name anywhere in the configuration."""
    names = [field.name for field in dataclasses.fields(owner)] if isinstance(owner, type) else list(owner)
    near = [join(path, name) for name in difflib.get_close_matches(key, names, n=1)]
    if not near:
        leaves = {dotted.rsplit(".", 1)[-1]: dotted for dotted in reversed(list(_dotted_paths(root)))}
        near = [leaves[name] for name in difflib.get_close_matches(key, leaves, n=1)]
    where = path or "the configuration"
    return f"{join(path, key)}: unknown key; " + (
        f"did you mean {near[0]}?" if near else f"need one of {where}'s: {', '.join(names)}"
    )


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def _dotted_paths(cls: type, path: str = "") -> Iterator[str]:
    for name, hint in get_type_hints(cls, include_extras=True).items():
        dotted = join(path, name)
        yield dotted
        for inner, key in _inner_classes(hint):
            yield from _dotted_paths(inner, join(dotted, key) if key else dotted)


def _inner_classes(hint: Any) -> Iterator[tuple[type, str]]:
    """Dataclasses within a declared type, each with the key or index that leads there ("" for the section itself)."""
    hint, notes = plain(hint)
    for note in notes:
        if isinstance(note, Variants | ByName):
            named = isinstance(note, ByName)
            classes = note.classes().items()
            yield from ((cls, name if named else "") for name, cls in classes if dataclasses.is_dataclass(cls))
            return
    if dataclasses.is_dataclass(hint):
        yield hint, ""
    elif get_origin(hint) is tuple:
        yield from ((inner, "0") for inner, _ in _inner_classes(get_args(hint)[0]))
    elif isinstance(get_origin(hint), type) and issubclass(get_origin(hint), Mapping):
        yield from ((inner, "NAME") for inner, _ in _inner_classes(get_args(hint)[1]))
    else:
        for option in get_args(hint):
            yield from _inner_classes(option)
