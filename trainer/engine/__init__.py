"""The engine: the one room that knows how a sum becomes a gradient on this hardware, and what holds the memory.

Every gradient is that of `sum over the global batch / denominator`, whatever the number of ranks or of micro-batches,
under every backend; nothing else in the code asks which one it is.
"""

from trainer.engine.engine import Engine, Update
from trainer.engine.opening import open_engine
from trainer.engine.processes import Processes, seed_everything

__all__ = ["Engine", "Processes", "Update", "open_engine", "seed_everything"]
