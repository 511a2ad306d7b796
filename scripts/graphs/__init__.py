"""Reads and edits workflow files of ComfyUI (format 0.4), with subgraphs; needs nothing but Python itself.

A file has one graph, and definitions of subgraphs that nodes stand for (`level`). `insertion` puts VRAM Fit into each
of them, at a place that `placing` finds; `flat` gives the nodes that really run, without subgraphs.
"""
