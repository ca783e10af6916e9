"""What pyproject.toml cannot say: the configurations, which lie beside the packages here, lie in one when installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDERS = ("accelerate_configs", "configs", "ds_configs")
INSIDE = "trainer/_shipped"
"""Where `trainer.shipped` looks for them."""


class BuildWithConfigurations(build_py):
    """Copies them into a wheel, and names them for a source distribution."""

    def run(self) -> None:
        """Copy the packages, then the configurations; an editable installation finds them where they lie."""
        super().run()
        if not self.editable_mode:
            for path, copy in self._copies():
                self.mkpath(str(copy.parent))
                self.copy_file(str(path), str(copy))

    def get_source_files(self) -> list[str]:
        """List what is needed to build."""
        return [*super().get_source_files(), *(str(path) for path, _ in self._copies())]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """List what a build leaves."""
        copies = [] if self.editable_mode else [str(copy) for _, copy in self._copies()]
        return [*super().get_outputs(include_bytecode), *copies]

    def _copies(self) -> Iterator[tuple[Path, Path]]:
        for path in sorted(path for folder in FOLDERS for path in Path(folder).rglob("*") if path.is_file()):
            yield path, Path(self.build_lib, INSIDE, path)


setup(cmdclass={"build_py": BuildWithConfigurations})
