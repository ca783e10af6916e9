"""Jobs on a SLURM cluster: the batch script, what leads it, and what it starts on each node."""
