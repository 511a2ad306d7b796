"""VRAM Fit with what other nodes do to a model's attention."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ..conftest import Core, off_by
from .conftest import LATENT_SHAPE, Fits, Sample

pytestmark = pytest.mark.host


def test_slg(assert_composes, run_node):
    assert_composes(lambda m: run_node("comfy_extras.nodes_slg","SkipLayerGuidanceDiT", model=m, double_layers="1", single_layers="", scale=3.0, start_percent=0.0, end_percent=1.0))
def test_slg2(assert_composes, run_node):
    assert_composes(lambda m: run_node("comfy_extras.nodes_slg","SkipLayerGuidanceDiTSimple", model=m, double_layers="1", single_layers="", start_percent=0.0, end_percent=1.0))
def test_nag(assert_composes, run_node):
    assert_composes(lambda m: run_node("comfy_extras.nodes_nag","NAGuidance", model=m, nag_scale=5.0,nag_alpha=.5,nag_tau=2.5), cfg=1.0)
def test_pag(assert_composes, run_node):
    assert_composes(lambda m: run_node("comfy_extras.nodes_pag","PerturbedAttentionGuidance", model=m, scale=3.0))
