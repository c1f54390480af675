"""The one exception that a bad configuration raises."""

from rcm_megatron.errors import UserError


class ConfigError(UserError):
    """A configuration that cannot run. The message has one line for each problem: where, what was got, what is needed, what to change."""

    status = 2
    on_all_ranks = True
