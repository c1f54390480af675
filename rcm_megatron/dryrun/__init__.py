"""A run's real iterations as one rank of a job that is not there: no GPU, no other ranks, no memory, no files (docs/dryrun.md)."""
