"""Families of networks: each a package with one value, all that the program knows of it, found by name in `rcm_megatron.registries`."""
