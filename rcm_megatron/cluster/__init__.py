"""What a run needs of the machines it is on, looked at before it starts."""
