"""What networks are trained for: one file an objective, one value each (`base.Objective`), found by name in `rcm_megatron.registries`."""
