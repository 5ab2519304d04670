"""Compute models on integers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn

from fxprune.api.integers import Floats
from fxprune.api.results import Result, Source, rewrite
from fxprune.api.weights import sparsify
from fxprune.errors import InputError
from fxprune.graph.inputs import ExampleInputs, Inputs
from fxprune.graph.passes import Observer
from fxprune.lowering.choices import DENSE, read_form
from fxprune.quantization import DEPTHWISE, calibrate
from fxprune.quantization.layers import find_kind
from fxprune.quantization.observers import check_observer
from fxprune.runtime import native
from fxprune.runtime.int8.layer import Int8Layer
from fxprune.runtime.weight_masks import is_plain
from fxprune.selection import read_patterns
from fxprune.sparsity.layers import DEFAULT_LAYERS, SparseLayer, choose_layers, find_layers
from passes import BlockSparseInt8Lowering, Quantization

__all__ = ["AUTO", "lower"]

AUTO = "auto"
"""Whichever backend is fastest for a layer on this machine, or float."""


def lower(
    model: nn.Module,
    example_inputs: ExampleInputs,
    *,
    calibration: Iterable[Any] | None = None,
    observer: str = "histogram",
    sparsity: float | str | Mapping[str, float] | None = None,
    layers: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    im2col: str | Iterable[str] = (),
    backend: str | Mapping[str, str] = AUTO,
    block: str | tuple[int, int] = "1x4",
    seed: int = 0,
    frontend: str = "auto",
    observers: Iterable[Observer] = (),
) -> Result:
    """Compute linear layers, 1×1 and depthwise convolutions of a trained model on 8-bit integers, zero blocks left out.

    Batch norms are folded, 1×1 convolutions become linear layers, and others that `im2col` names; `calibration` says
    which values occur, and every layer gets what computes it fastest. A model that was pruned or made sparse before may
    be given; its masks are baked into the weights.

    Args:
        model: any floating-point module in evaluation mode; it is not changed.
        example_inputs: what the model is called with: a tensor, a tuple of arguments, a dict, or `Inputs`.
        calibration: batches of real inputs, each as `example_inputs`; of those of a DataLoader labels are left out.
        observer: how ranges are found in them: "histogram", "percentile" or "min-max".
        sparsity: fraction of the 1×1 convolutions' weights to zero first, or of `layers`, at least ("60%", 0.6); or one
            for each layer name, glob, type or kind, as in `sparsify`. By default zeros stay as they are.
        layers: which layers to compute on integers, by kind, name, glob or type, as in `sparsify`; all by default.
        exclude: which of them not; they are not made sparse either.
        im2col: names, globs or types of convolutions with larger kernels that are computed on integers too, on patches
            that are gathered first; "*" for all. Where that cannot be done, or is slower, they stay convolutions.
        backend: "auto" measures every layer on this machine, with as many threads as torch is set to, and keeps in
            float what is faster so; "native", "onednn", "fbgemm" or "reference" for all; or one for each layer name,
            glob or type, with the form of the weights, if you like, as {"classifier": "onednn dense"}.
        block: output × input channels of the blocks that are left out where they are zero; "dense" for none.
        seed: of sparsity; nothing else is random.
        frontend: "auto", "symbolic" or "export".
        observers: called after every pass.

    Raises:
        InputError, TraceError, TargetError, SpecError: a mistake in the call; the model is unchanged.
        VerifyError: a defect of fxprune.
    """
    inputs, watching, form = Inputs.of(example_inputs), tuple(observers), read_form(block)
    step = BlockSparseInt8Lowering("native" if backend == AUTO else backend, form)
    check_observer(observer)
    batches = _checked(model, calibration, is_measured=backend == AUTO)
    wanted = _Wanted(read_patterns(layers), read_patterns(exclude))
    if sparsity is None:
        before = rewrite(Source(model, inputs, frontend, "", seed), (), None, watching)
    else:
        options = wanted.to_sparsify(sparsity, form) | {"seed": seed, "frontend": frontend, "observers": watching}
        before = sparsify(model, inputs, **options)
    quantization = wanted.quantization(before.traced)
    floats = Floats.of(before, watching, read_patterns(im2col))
    ranges = calibrate(floats.graph, batches, observer=observer)
    quantization = replace(quantization, ranges=ranges, depthwise=native.load())
    result = floats.lower_fastest(quantization, form) if backend == AUTO else floats.lower(quantization, step)
    return replace(result, notes=(*result.notes, *_missing(result.module)))


def _missing(module: fx.GraphModule) -> tuple[str, ...]:
    """Say why depthwise convolutions stay in float, where that is for want of our kernels; the reference is slow."""
    reason = native.why_not()
    is_left = any(find_kind(part) is DEPTHWISE for part in module.modules())
    return (f"depthwise convolutions stay in float: {reason}",) if reason is not None and is_left else ()


def _checked(model: nn.Module, calibration: Iterable[Any] | None, *, is_measured: bool) -> Iterable[Any]:
    """Refuse what cannot be lowered; return the batches."""
    for path, part in model.named_modules():
        if isinstance(part, Int8Layer):
            raise InputError(f"the model is lowered already: '{path}' is a {type(part).__name__}; give the float model")
    if model.training:
        raise InputError("the model is in training mode, and lowering is for inference; call model.eval() first")
    devices = {tensor.device.type for tensor in model.parameters()} - {"cpu"}
    if is_measured and devices:
        raise InputError(f"the model is on {devices.pop()}, and kernels are chosen for CPUs; call model.cpu() first")
    if calibration is None:
        raise InputError(
            "lowering needs data to find the ranges of values: give calibration=batches, inputs such as the model will "
            "see; calibration=[example_inputs] does where these are real"
        )
    if isinstance(calibration, (Tensor, Inputs, Mapping, str)):
        raise InputError(f"calibration is one {type(calibration).__name__}; give several batches, or [batch]")
    if not isinstance(calibration, Iterable):
        raise InputError(
            f"calibration is a {type(calibration).__name__}; give batches: a list, a generator, a DataLoader"
        )
    return calibration


@dataclass(frozen=True)
class _Wanted:
    """The layers that a user wants computed on integers, by kind, name, glob or type; all where there are none."""

    layers: tuple[str, ...]
    exclude: tuple[str, ...]

    def to_sparsify(self, sparsity: float | str | Mapping[str, float], form: str) -> dict[str, Any]:
        """Return the options of `sparsify` for them."""
        options: dict[str, Any] = {"sparsity": sparsity, "exclude": self.exclude}
        if form != DENSE:
            options["block"] = form
        return options if isinstance(sparsity, Mapping) else options | {"layers": self.layers or DEFAULT_LAYERS}

    def quantization(self, traced: fx.GraphModule) -> Quantization:
        """Return the pass for them, by path: kinds and types are others once 1×1 convolutions are linear layers.

        Raises `InputError` for a weight that is computed, `SpecError` for a pattern that matches nothing.
        """
        known = find_layers(traced, {})
        chosen = choose_layers(traced, known, self.layers or ("all",) * bool(known), self.exclude)
        for layer in chosen:
            path, owner, _ = layer.owners[0]
            is_able = layer.shape[2:].numel() == 1 or layer.shape[1] == 1
            if is_able and not is_plain(owner, "weight"):
                raise InputError(_computed(path, owner))
        excluded = choose_layers(traced, known, self.exclude)
        return Quantization(_paths(chosen) if self.layers else (), _paths(excluded))


def _computed(path: str, owner: Any) -> str:
    kinds = [type(part).__name__ for part in owner.parametrizations.weight]
    return (
        f"the weight of '{path}' is computed by {', '.join(kinds)}; bake it in with "
        "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight'), or exclude the layer"
    )


def _paths(layers: Iterable[SparseLayer]) -> tuple[str, ...]:
    return tuple(path for layer in layers for path, _, _ in layer.owners)
