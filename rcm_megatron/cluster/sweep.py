"""The lines of a sweep, one run each: read as a shell reads words, checked before anything is submitted, written for `train.sbatch`.

    python -m rcm_megatron.cluster.sweep lines.txt CONFIG [KEY=VALUE ...] > copy

Needs no torch, so that a login node can run it. `train.sbatch` splits a line of the copy at white space, which is why a word of the copy
holds none: values with spaces become YAML in double quotes, where a space can be written \\u0020.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rcm_megatron.config import ConfigError, RunConfig, apply_overrides, load_config, validate

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")
_SUBSTITUTION = re.compile(r"`|\$\(")
_OPERATORS = ";&|<>()"
"""What a shell would act on outside quotes; nothing acts on it here."""


def read_sweep(path: Path, config: str | Path, overrides: Sequence[str] = ()) -> list[str]:
    """The lines of ``path`` for `train.sbatch`, comments left out. ConfigError with every line that cannot run, and what to write."""
    lines, folders, problems = [], {}, []
    for number, text in _numbered_lines(path):
        try:
            words = split_line(text)
            if not words:
                continue
            run = _run_of(config, [*overrides, *words])
            folder = os.path.realpath(run.output_dir)
            if folder in folders:
                raise ConfigError(
                    f"output_dir {run.output_dir} is also that of line {folders[folder]}; need a folder for each line; fix: give it "
                    "output_dir=... of its own"
                )
            folders[folder] = number
            lines.append(" ".join(map(_without_spaces, words)))
        except ConfigError as error:
            problems.append(f"{path}, line {number}: {error}")
    if not lines and not problems:
        problems.append(f"got no lines in {path}; need one for each run, e.g. seed=1 output_dir=runs/seed_1")
    if problems:
        raise ConfigError("\n".join(problems))
    return lines


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; name a file of lines of KEY=VALUE") from None
    except UnicodeDecodeError:
        raise ConfigError(f"got {path}, which is not UTF-8; need a text file; fix: save it as UTF-8") from None
    yield from enumerate((line.removesuffix("\r") for line in text.split("\n")), start=1)


def split_line(text: str, variables: Mapping[str, str] = os.environ) -> list[str]:
    """The words of a line as a shell has them: quotes, backslashes, $NAME, and a comment from a # that begins a word.

    Raises ConfigError for a quote that is not closed, and for a word that is no KEY=VALUE.
    """
    try:
        words = shlex.split(_prepared(text, variables))
    except ValueError as error:
        raise ConfigError(f"{error}; need whole quotes; fix: close the quote, or write \\\\ for a backslash") from None
    for word in words:
        if not re.match(r"[\w.]+=", word):
            fix = "quote a value with spaces, e.g. 'distillation.fixed_rollout_times=[1.5, 1.4, 1.0]'"
            raise ConfigError(f"got the word {word!r}; need KEY=VALUE; fix: {fix}")
    return words


def _prepared(text: str, variables: Mapping[str, str]) -> str:
    """The line up to its comment, with values in place of $NAME; what a shell would run is refused."""
    done, quote, index = [], "", 0
    while index < len(text):
        character, taken = text[index], 1
        if character == "\\" and quote != "'":
            taken = 2
        elif character in ("'", '"'):
            quote = "" if character == quote else quote or character
        elif character == "#" and not quote and (index == 0 or text[index - 1].isspace()):
            break
        elif (character in _OPERATORS and not quote) or (_SUBSTITUTION.match(text, index) and quote != "'"):
            fix = "single quotes around the word" if quote else "quotes around the word"
            raise ConfigError(f"got {character!r}, which a shell would act on; need plain words; fix: {fix}")
        elif (found := _VARIABLE.match(text, index)) and quote != "'":
            done.append(_escaped(_value(found, variables), quote))
            index = found.end()
            continue
        done.append(text[index : index + taken])
        index += taken
    return "".join(done)


def _value(found: re.Match[str], variables: Mapping[str, str]) -> str:
    name = found[1] or found[2]
    if name not in variables:
        raise ConfigError(
            f"got ${name}, which is not set here; need a variable that is; fix: set it, or quote the word with ' '"
        )
    return variables[name]


def _escaped(value: str, quote: str) -> str:
    """``value`` so that a shell reads it back inside ``quote``."""
    return re.sub(r'(["\\$`])', r"\\\1", value) if quote else shlex.quote(value)


def _run_of(config: str | Path, overrides: Sequence[str]) -> RunConfig:
    """The run, checked as far as that can be done without the number of processes: on one replica."""
    run = load_config(config, overrides)
    validate(run, max(1, run.parallel.model_parallel_size))
    return run


def _without_spaces(word: str) -> str:
    if not re.search(r"\s", word):
        return word
    key, _, text = word.partition("=")
    value = apply_overrides({}, [f"value={text}"])["value"]
    text = json.dumps(value, separators=(",", ":"), default=str)
    return key + "=" + text.replace(" ", "\\u0020")


def main(argv: Sequence[str]) -> int:
    """Status 2 and every problem on stderr, or the lines on stdout."""
    try:
        print("\n".join(read_sweep(Path(argv[0]), argv[1], argv[2:])))
    except ConfigError as error:
        print(f"sweep.sh: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
