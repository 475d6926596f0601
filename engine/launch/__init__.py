"""Commands: the command line; runs in turn, in parallel or on Slurm; estimates; progress."""
