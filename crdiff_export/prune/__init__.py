"""Which weights are set to zero: plan, thresholds, criteria and the kernels that count and clear."""
