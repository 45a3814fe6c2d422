"""Ways to compute single operations that XLA does not have: for its CPU backend, and in Pallas for GPUs."""
