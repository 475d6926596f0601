"""Figures of the measurements that the paper does not have."""
