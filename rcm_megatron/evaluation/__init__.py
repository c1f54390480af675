"""How good and how varied videos are: samplers of a run side by side, folders of videos, VBench's files in both directions."""
