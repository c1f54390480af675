"""The numbers of the official implementation, replayed on any parallel layout."""
