"""A command for tests: every rank writes down what it was given, into the folder it is given."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

NAMES = (
    "RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GLOO_SOCKET_IFNAME",
    "A_KEY",
    "PYTHONPATH",
    "SLURM_NNODES",
)

if __name__ == "__main__":
    seen = {name: os.environ.get(name) for name in NAMES} | {"arguments": sys.argv[2:], "folder": str(Path.cwd())}
    Path(sys.argv[1], f"rank-{os.environ['RANK']}.json").write_text(json.dumps(seen))
