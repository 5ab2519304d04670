"""Fourier transforms, and complex numbers seen as pairs of real ones."""

from __future__ import annotations

from fxprune.labels.call import Call, Rule, normalised
from fxprune.labels.flow import Labels

__all__ = ["RULES"]


def transform(call: Call) -> Labels:
    """Every position of the transformed dimensions depends on all others there: pinned; the others pass."""
    labels = list(call.labels(call["self"]))
    for d in call["dim"]:
        call.flow.pin(labels[normalised(d, len(labels))], "a Fourier transform is taken along this dimension")
        labels[normalised(d, len(labels))] = None
    return tuple(labels)


def as_real(call: Call) -> Labels:
    """`view_as_real`, […] complex → […, 2]: labels pass."""
    return (*call.labels(call["self"]), None)


def as_complex(call: Call) -> Labels:
    """`view_as_complex`, […, 2] → […] complex: the pairs are pinned, the others pass."""
    *labels, parts = call.labels(call["self"])
    call.flow.pin(parts, "real and imaginary part")
    return tuple(labels)


RULES: dict[str, Rule] = {
    **dict.fromkeys(["aten._fft_r2c", "aten._fft_c2c", "aten._fft_c2r"], transform),
    "aten.view_as_real": as_real,
    "aten.view_as_complex": as_complex,
}
