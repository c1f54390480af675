"""LoRA files: their namings (one value each), merging them into networks, and extracting them from two networks."""
