"""Measurements that the paper does not have, each run as a module: python -m beyond.NAME CONFIG."""
