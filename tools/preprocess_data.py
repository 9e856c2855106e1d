#!/usr/bin/env python3
"""Turns JSONL text into Megatron corpora and a manifest: `megatron-lpr preprocess` under its usual name."""

import sys

from megatron_lpr.cli import main

if __name__ == "__main__":
    sys.exit(main(["preprocess", *sys.argv[1:]]))
