"""Networks without training: sampling, export, verification, and what diffusers' pipelines need."""

import rcm_megatron.platform.megatron  # noqa: F401  before any import of megatron.core, as its docstring asks
