"""Gates in a graph: where predictors look, what gates say of channels and cost, what they leave when they harden."""
