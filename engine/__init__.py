"""What every script shares: configuration, run directories, training, evaluation, command line."""
