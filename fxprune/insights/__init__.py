"""Insights: which layers a pruned model lost, which it could not do without, and how wide they are."""

from __future__ import annotations

from fxprune.insights.profile import LayerProfile, RoleProfile, SparsityProfile, sparsity_profile
from fxprune.insights.roles import ROLES, layer_depths, layer_roles
from fxprune.insights.sensitivity import LayerSensitivity, RoleSensitivity, Sensitivity, SkippedLayer, sensitivity
from fxprune.insights.widths import LayerWidth, StageWidth, layer_widths, stage_table, stage_widths

__all__ = [
    "ROLES",
    "LayerProfile",
    "LayerSensitivity",
    "LayerWidth",
    "RoleProfile",
    "RoleSensitivity",
    "Sensitivity",
    "SkippedLayer",
    "SparsityProfile",
    "StageWidth",
    "layer_depths",
    "layer_roles",
    "layer_widths",
    "sensitivity",
    "sparsity_profile",
    "stage_table",
    "stage_widths",
]
