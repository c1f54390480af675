"""Latent datasets: WebDataset tar shards, their manifest, one order for every layout, and the DALI loader."""
