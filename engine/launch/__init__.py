"""Commands: the command line, runs one by one, side by side or on Slurm, estimates, progress."""
