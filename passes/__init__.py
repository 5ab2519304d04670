"""The rewrites, one file each. `PASSES` lists them in the order of a full pipeline."""

from __future__ import annotations

from fxprune.graph.passes import Pass
from passes.batchnorm_folding import BatchnormFolding
from passes.block_sparse_int8_lowering import BlockSparseInt8Lowering
from passes.channel_selection import ChannelSelection
from passes.channel_surgery import ChannelSurgery
from passes.conv1x1_to_linear import Conv1x1ToLinear
from passes.dead_code_elimination import DeadCodeElimination
from passes.gate_hardening import GateHardening
from passes.mask_insertion import MaskInsertion
from passes.orbit_detection import OrbitDetection
from passes.plan_application import PlanApplication
from passes.quantization import Quantization
from passes.shape_propagation import ShapePropagation
from passes.weight_plan_application import WeightPlanApplication
from passes.weight_sparsification import WeightSparsification

__all__ = [
    "PASSES",
    "BatchnormFolding",
    "BlockSparseInt8Lowering",
    "ChannelSelection",
    "ChannelSurgery",
    "Conv1x1ToLinear",
    "DeadCodeElimination",
    "GateHardening",
    "MaskInsertion",
    "OrbitDetection",
    "PlanApplication",
    "Quantization",
    "ShapePropagation",
    "WeightPlanApplication",
    "WeightSparsification",
]

PASSES: tuple[type[Pass], ...] = (
    ShapePropagation,
    OrbitDetection,
    MaskInsertion,
    GateHardening,
    ChannelSelection,
    PlanApplication,
    ChannelSurgery,
    WeightSparsification,
    WeightPlanApplication,
    BatchnormFolding,
    Conv1x1ToLinear,
    Quantization,
    BlockSparseInt8Lowering,
    DeadCodeElimination,
)
