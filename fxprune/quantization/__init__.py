"""From float graphs to graphs that compute on uint8: ranges of values, and where values change their form.

| module | what it holds |
| --- | --- |
| `ranges`, `observers`, `calibration` | the range of every value, and how it is found in data |
| `rules` | what every kind of operator does with uint8 values: one table |
| `activations`, `layers`, `building` | kinds of layers that compute on uint8, how they are made, why others are not |
| `values`, `permuting`, `placement` | how values depend on each other; which are uint8, and where they become so |
| `selection`, `choosing` | which layers, with which numbers |
| `rewriting`, `facts` | the edit of the graph; what it left in float |
"""

from __future__ import annotations

from fxprune.quantization.calibration import calibrate
from fxprune.quantization.choosing import Choice, ChosenLayer, choose
from fxprune.quantization.facts import float_layers
from fxprune.quantization.layers import DEPTHWISE
from fxprune.quantization.observers import OBSERVERS
from fxprune.quantization.ranges import Range, Ranges
from fxprune.quantization.rewriting import quantize_layers
from fxprune.quantization.selection import Wanted

__all__ = [
    "DEPTHWISE",
    "OBSERVERS",
    "Choice",
    "ChosenLayer",
    "Range",
    "Ranges",
    "Wanted",
    "calibrate",
    "choose",
    "float_layers",
    "quantize_layers",
]
