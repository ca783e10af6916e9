"""What runs on every rank: recipe, data, model, objective, engine, loop, scoring, checkpoints."""

__version__ = "0.1.0"
