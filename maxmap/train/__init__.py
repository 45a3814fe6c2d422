"""Training: the loop, what builds its parts, the step, and what a run reports."""
