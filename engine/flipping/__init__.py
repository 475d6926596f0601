"""Neuron flipping (Section 6.1): gates, cached passes, the greedy search, batch-norm folding."""
