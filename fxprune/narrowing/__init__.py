"""Cutting a graph to the channels that its masks keep: tensors, leaf attributes, literals."""
