"""From the words on the command line to a command's exit status, and from what a user can cause to one message."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence

from rcm_megatron.cli.commands import COMMANDS, Command
from rcm_megatron.cli.options import add_options, to_request
from rcm_megatron.errors import UserError

INTERRUPTED = 130
"""Exit status after Ctrl-C, where nothing is saved: what a shell gives for it."""
KEY_VALUE = "KEY=VALUE"
COMMON_SUMMARY = {
    "build-dataset": "Build a dataset of latent shards",
    "evaluate": "Measure quality and diversity",
}
"""Of commands with commands below them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. What a user can cause is one message on stderr and the error's own exit status."""
    command, arguments, prog = _parse(sys.argv[1:] if argv is None else list(argv))
    request = to_request(command.request, arguments)
    try:
        if command.load is None:
            return command.run(request) or 0
        return command.run(command.load(arguments.config_file, arguments.overrides, request), request) or 0
    except UserError as error:
        return report(error, prog, names_rank=command.load is not None)
    except KeyboardInterrupt:
        return INTERRUPTED


def report(error: UserError, prog: str, *, names_rank: bool) -> int:
    """Say what is wrong, by rank 0 alone where all ranks find the same; the exit status."""
    rank = os.environ.get("RANK", "0")
    if error.on_all_ranks and rank != "0":
        return error.status
    where = f"rank {rank}: " if names_rank and not error.on_all_ranks else ""
    print(f"{prog}: {where}{error}", file=sys.stderr, flush=True)
    return error.status


def _parse(argv: list[str]) -> tuple[Command, argparse.Namespace, str]:
    """Overrides may also stand after options, where argparse would not expect more positionals."""
    program = os.path.basename(sys.argv[0])
    parser = argparse.ArgumentParser(
        prog="python -m rcm_megatron" if program == "__main__.py" or not program.startswith("rcm") else program,
        description="Distil video diffusion transformers into 1-4 step generators with rCM on Megatron-Core.",
    )
    _add_commands(parser, COMMANDS, argv)
    arguments, extra = parser.parse_known_args(argv)
    late = [item for item in extra if "=" in item and not item.startswith("-")]
    takes = next((name for name in ("overrides", "layout") if hasattr(arguments, name)), None)
    if len(late) < len(extra) or (late and takes is None):
        unknown = [item for item in extra if takes is None or item not in late]
        arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if late:
        setattr(arguments, takes, [*getattr(arguments, takes), *late])
    return arguments.command, arguments, arguments.parser.prog


def _add_commands(
    parser: argparse.ArgumentParser, commands: Mapping[str, Command | Mapping[str, Command]], argv: Sequence[str]
) -> None:
    """One subparser a command; options are derived for the one that is called alone."""
    below = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in commands.items():
        if isinstance(command, Mapping):
            summary = f"{COMMON_SUMMARY[name]}: {' or '.join(command)}."
            _add_commands(below.add_parser(name, help=summary), command, argv)
            continue
        added = below.add_parser(name, help=command.summary, description=command.summary)
        added.set_defaults(command=command, parser=added)
        if name in argv:
            if command.load is not None:
                added.add_argument(
                    "config_file",
                    metavar="config",
                    help="YAML of a run, or the name of a shipped one, e.g. wan2.1-t2v-14b",
                )
                added.add_argument(
                    "overrides", nargs="*", metavar=KEY_VALUE, help="e.g. parallel.tp=2 stages.0.steps=100"
                )
            add_options(added, command.request)
