"""Slots, labels, the rules that let labels flow, and the orbits that come out."""
