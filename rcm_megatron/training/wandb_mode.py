"""Whether a run goes to the service of Weights & Biases: what the configuration, W&B's own variables and a login say."""

import logging
import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit

from rcm_megatron.config import ConfigError

log = logging.getLogger(__name__)

_MODES = {
    "online": "online",
    "run": "online",
    "shared": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
"""Values of WANDB_MODE -> what they come to."""
_QUIETEST_FIRST = ("disabled", "offline", "online")


def wandb_mode(configured: str) -> str:
    """`online`, `offline` or `disabled`, from logging.wandb_mode and the environment.

    WANDB_MODE decides where the configuration says auto, and can only make it quieter where it names a mode. auto without the variable is
    online when there is an API key or a login. Raises ConfigError for a WANDB_MODE that W&B does not know.
    """
    asked = _from_environment()
    if configured != "auto":
        mode = min(configured, asked or configured, key=_QUIETEST_FIRST.index)
        if mode != configured:
            log.warning("Weights & Biases is %s by WANDB_MODE, though logging.wandb_mode=%s", mode, configured)
        return mode
    return asked or ("online" if _has_key() else "offline")


def _from_environment() -> str | None:
    value = os.environ.get("WANDB_MODE", "").strip().lower()
    if value and value not in _MODES:
        raise ConfigError(
            f"got WANDB_MODE={value}; need one of {', '.join(_MODES)}; fix: unset it, or set one of these"
        )
    return _MODES.get(value)


def _has_key() -> bool:
    """An API key or token in the environment, or a login (`wandb login` writes ~/.netrc, or the file that NETRC names) for its server."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    server = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    named = os.environ.get("NETRC")
    for path in [Path(named).expanduser()] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            login = netrc.netrc(path).authenticators(server)
        except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
            continue
        if login is not None and login[2]:
            return True
    return False
