"""Formats of checkpoints: each one value, found by name in `rcm_megatron.registries`."""
