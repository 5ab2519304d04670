"""Insights: which layers a pruned model lost, and which it could not do without (paper 000, §4.4)."""

from __future__ import annotations

from fxprune.insights.profile import LayerProfile, RoleProfile, SparsityProfile, sparsity_profile
from fxprune.insights.roles import ROLES, layer_depths, layer_roles
from fxprune.insights.sensitivity import LayerSensitivity, RoleSensitivity, Sensitivity, SkippedLayer, sensitivity

__all__ = [
    "ROLES",
    "LayerProfile",
    "LayerSensitivity",
    "RoleProfile",
    "RoleSensitivity",
    "Sensitivity",
    "SkippedLayer",
    "SparsityProfile",
    "layer_depths",
    "layer_roles",
    "sensitivity",
    "sparsity_profile",
]
