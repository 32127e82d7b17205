"""What a run leaves on disk: its settings, rounds, checkpoints and result. Writers and readers of each."""
