"""Which videos an evaluation has: prompts, their file names in VBench's way, noise of each sample."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from rcm_megatron.data.captions import read_prompts
from rcm_megatron.errors import InputError

MOST_SAMPLES = 1000
"""Of a prompt: sample i of prompt p has the noise of number 1000 p + i, so that more samples change none that are there."""
_LONGEST_NAME = 255
"""Bytes of a file's name on Linux."""
_SLUG = 60
"""Characters at which `rcm sample` cuts a caption in a name."""
_NUMBERED = re.compile(r"(?P<prompt>.*)-(?P<index>\d+)")
_SAMPLED = re.compile(r"(?P<index>\d{4,})_(?P<prompt>.*)")


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One video to sample."""

    short: str
    """The prompt that its name says."""
    prompt: str
    """The one that the network is given."""
    index: int
    """Which of the prompt's samples, from 0."""
    noise: int
    """Index of its noise: the same for every sampler."""

    @property
    def stem(self) -> str:
        """`{prompt}-{index}`, VBench's name without the ending; a slash becomes a dash."""
        return f"{file_name(self.short)}-{self.index}"


def file_name(prompt: str) -> str:
    """A prompt in the name of a file: as it is, but for what no name can hold. VBench looks for it unchanged."""
    return prompt.replace("/", "-").replace("\0", "-")


def prompt_of(path: Path) -> str:
    """The prompt of a video: in its name as `{prompt}-{index}`; of `rcm sample` in the latent beside it; or else the whole name.

    `rcm sample`'s own names hold a beginning of the caption, by which two captions may be equal.
    """
    if found := _SAMPLED.fullmatch(path.stem):
        latent = path.with_suffix(".safetensors")
        stored = _metadata(latent).get("prompt") if latent.is_file() else None
        return stored or (found["prompt"] if len(found["prompt"]) < _SLUG else path.stem)
    found = _NUMBERED.fullmatch(path.stem)
    return found["prompt"] if found else path.stem


def _metadata(path: Path) -> dict[str, str]:
    """{} where it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def read_clips(
    prompts: Path, *, long_prompts: Path | None = None, samples: int, more: Path | None = None, more_samples: int = 0
) -> list[Clip]:
    """The clips of a file of prompts, each prompt once (VBench's 946 lines are 944 prompts): ``samples`` of each.

    Line i of ``long_prompts`` is what the network is given for line i of ``prompts``, which stays in the names; of a prompt that comes
    twice, the first. Prompts of the file ``more`` (VBench's temporal_flickering) have ``more_samples``. InputError for what does not fit.
    """
    short = read_prompts(prompts)
    given = short if long_prompts is None else read_prompts(long_prompts)
    if len(given) != len(short):
        raise InputError(
            f"got {len(given)} prompts in {long_prompts} and {len(short)} in {prompts}, need as many; fix: give the two of one list"
        )
    pairs: dict[str, str] = {}
    for name, text in zip(short, given, strict=True):
        pairs.setdefault(name, text)
    counted = set(read_prompts(more)) if more is not None else set()
    if unknown := sorted(counted - pairs.keys()):
        raise InputError(
            f"got {unknown[0]!r} in {more}, need prompts of {prompts}; {len(unknown)} are not in it; fix: give its whole list"
        )
    for option, count in {"--samples": samples, "--flickering-samples": more_samples if counted else 1}.items():
        if not 1 <= count <= MOST_SAMPLES:
            raise InputError(f"got {option} {count}, need 1 to {MOST_SAMPLES}; fix: VBench's are 5, and 25")
    _check_names(pairs, longest_index=max(samples, more_samples) - 1)
    return [
        Clip(short=name, prompt=text, index=index, noise=MOST_SAMPLES * number + index)
        for number, (name, text) in enumerate(pairs.items())
        for index in range(more_samples if name in counted else samples)
    ]


def _check_names(prompts: Collection[str], *, longest_index: int) -> None:
    taken: dict[str, str] = {}
    for prompt in prompts:
        name = file_name(prompt)
        size = len(f"{name}-{longest_index}.safetensors".encode())
        if size > _LONGEST_NAME:
            raise InputError(
                f"got a prompt of {len(prompt)} characters ({prompt:.40}…), whose file's name would have {size} bytes, need at most "
                f"{_LONGEST_NAME}; fix: give short prompts as --prompts and these as --long-prompts"
            )
        if name.startswith("."):
            raise InputError(
                f"got the prompt {prompt!r:.60}, whose file would be hidden; fix: let it begin without a dot"
            )
        if name in taken:
            raise InputError(
                f"got {taken[name]!r} and {prompt!r}, whose videos would have one name, {name}-0.mp4; fix: reword one of them"
            )
        taken[name] = prompt


def distinct_prompts(clips: Sequence[Clip]) -> list[str]:
    """What the network is given, each once, in their order."""
    return list(dict.fromkeys(clip.prompt for clip in clips))
