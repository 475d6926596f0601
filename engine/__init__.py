"""Shared code of the scripts, in rooms: config, runs, training, flipping and launch."""
