"""Training: optimizers, EMA, the steps and the loop around them; sampling and export of what was trained."""

import rcm_megatron.platform.megatron  # noqa: F401  before any import of megatron.core, as its docstring asks
