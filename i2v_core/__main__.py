"""`python -m i2v_core plan`: what a plan would be, without weights and without a card. See `--help`."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main(sys.argv[1:]))
