"""Rules between the sections of a run: each a generator of what is wrong, by topic. None needs weights or torch.

What one field or one section must be is said by its types and its ``check`` (`declare.py`). A rule may read any field: where one was
refused already the rule ends.
"""

from __future__ import annotations

from rcm_megatron.config.advice import explain
from rcm_megatron.config.declare import Problem, until_refused
from rcm_megatron.config.reading import section_problems
from rcm_megatron.config.run import RunConfig
from rcm_megatron.config.validate.inputs import INPUT_RULES
from rcm_megatron.config.validate.layout import LAYOUT_RULES, WORLD_RULES
from rcm_megatron.config.validate.networks import NETWORK_RULES
from rcm_megatron.config.validate.precision import PRECISION_RULES

RULES = (*NETWORK_RULES, *LAYOUT_RULES, *PRECISION_RULES, *INPUT_RULES)


def problems_of(config: RunConfig, world_size: int | None) -> list[str]:
    """Every reason why ``config`` cannot run on ``world_size`` processes, with advice that works; null: those within a section alone."""
    return explain(config, world_size, _all_problems)


def is_valid(config: RunConfig, world_size: int) -> bool:
    """Whether ``config`` can run on ``world_size`` processes; in less time than `problems_of`, which looks for advice."""
    return not _all_problems(config, world_size)


def _all_problems(config: RunConfig, world_size: int | None) -> list[Problem]:
    found = list(section_problems(config))
    if world_size is not None:
        rules = [rule(config) for rule in RULES] + [rule(config, world_size) for rule in WORLD_RULES]
        for rule in rules:
            found += until_refused(rule)
    return found
