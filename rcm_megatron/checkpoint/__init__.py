"""Checkpoints: external formats in and out, and the run's own distributed checkpoints."""
