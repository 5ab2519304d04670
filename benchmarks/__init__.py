"""Measurements of fxprune beside other tools; run one as `python -m benchmarks.NAME` from the project's folder."""
