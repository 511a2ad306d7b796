"""Core's LTX-Video and LTX-2.x in chunks of tokens, equal to core's own forward.

Keys and values are made for all tokens, and everything else runs on some tokens at a time and updates the hidden state
in place, as core does. What core makes for all tokens before the first block and keeps until the last, rotary tables
and embedded time steps, is kept as positions and as one row for each distinct time step.

Shape legend of this package: B batch, L tokens, n tokens of a chunk, D width, S distinct time steps, C channels.
"""

from __future__ import annotations

from .model import LTX

MODEL = LTX()
