"""Wan I2V: 2.1 14B, 2.2 A14B with two experts, and 2.2 TI2V-5B."""

from .family import Wan
from .ti2v import WanTI2V

FAMILIES = (Wan(), WanTI2V())
