"""`python -m rcm_megatron COMMAND`, the same as `rcm COMMAND`."""

import sys

from rcm_megatron.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
