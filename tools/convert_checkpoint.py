"""Convert a checkpoint: `python tools/convert_checkpoint.py SOURCE TARGET --to FORMAT`, the same as `python -m rcm_megatron convert`."""

import sys

from rcm_megatron.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
