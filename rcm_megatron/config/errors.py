"""The one exception that a bad configuration raises."""


class ConfigError(ValueError):
    """A configuration that cannot run. The message says what was got, what is needed and what to change."""
