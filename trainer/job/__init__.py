"""The job a run is part of: what it leaves in the run directory, and what each rank knows of it. Imports no torch."""
