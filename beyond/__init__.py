"""Measurements that the paper does not have, each run as a module: python -m beyond.NAME CONFIG.

example_scores        published scores of every example      scores.py has their formulas
counterfactual        trainings with and without an example  halves.py draws and counts them
gradient_distance     gradient norm and distance to a class
planted_memorization  localizers against known neurons       localizers, bench, agreement,
                                                             channel_control, channel_planting
erasure               methods that make a network forget     localizers, agreement
"""
