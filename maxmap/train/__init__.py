"""Training: the numerics of a step and the loop around it."""
