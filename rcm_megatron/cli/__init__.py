"""The command line, `rcm COMMAND` or `python -m rcm_megatron COMMAND`: options from request dataclasses, one place for errors."""
