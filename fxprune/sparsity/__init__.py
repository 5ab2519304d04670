"""Weight sparsity: which weights of which layers become zero, for a target."""
