"""Writes the teachers' K/V of a dataset to a .pt file or a store; see `--help`."""

import sys

from extraction.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "extract_dual_style_kv.py"))
