"""Graphs: tracing, shapes, text, verification, and what a pass is. Knows no operator."""
