"""Training: the loop, its record, resuming, evaluation, building, and devices."""
