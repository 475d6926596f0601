"""What the scripts share, in rooms: config, runs, training, flipping and launch."""
