"""Which layout and memory policies a run should take on so many GPUs: every legal one by formula, the best confirmed by dry runs."""
