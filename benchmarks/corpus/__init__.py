"""Clips and models of workflow templates: what their samplers sample, read from the files alone.

`figures` follows numbers and picture sizes through a prompt, with `arithmetic` for its formulas; `clips` finds the clip
of each sampler, and `models` the real configuration of the model that its loader names.
"""
