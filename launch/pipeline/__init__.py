"""`signscale pipeline`: stages that depend on each other, here in sequence or as jobs that wait for each other."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    # The batch job reads a stage's record without what the command needs.
    from launch.pipeline.command import main as command

    return command(argv)
