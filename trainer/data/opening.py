"""From a recipe to the splits of a corpus, whether it lies in a file per clip or packed, here or in an object store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trainer.data.corpus import feature_dim, read_split
from trainer.data.features import Moments
from trainer.data.shards.format import MANIFEST
from trainer.data.shards.packed import PackedCorpus
from trainer.data.shards.store import open_store
from trainer.data.table import Split, folder_split
from trainer.errors import InputError
from trainer.recipe import CorpusRecipe

Log = Callable[[str], None]


class OpenCorpus:
    """A corpus whose splits can be asked for."""

    def __init__(self, recipe: CorpusRecipe, log: Log) -> None:
        """Open the corpus; raises `InputError` if there is none."""
        self._recipe, self._log = recipe, log
        self._packed: PackedCorpus | None = None
        if is_packed(recipe.data_dir):
            if recipe.annotations:
                raise InputError(
                    f"annotations: {recipe.data_dir} is a packed corpus, which brings its own; drop --annotations, or "
                    "pack the corpus anew with others (signscale pack --annotations)"
                )
            store = open_store(recipe.data_dir, cache_dir=recipe.cache_dir, cache_gb=recipe.cache_gb)
            self._packed = PackedCorpus(store)
        elif not Path(recipe.data_dir).is_dir():
            raise InputError(
                f"{recipe.data_dir}: expected the corpus folder with train/ and dev/, found none; mend --data_dir"
            )

    @property
    def moments(self) -> Moments | None:
        """Return the moments of all training clips, where they were computed when the corpus was packed."""
        return None if self._packed is None else self._packed.moments

    def split(self, name: str, *, expected_dim: int | None = None) -> Split:
        """Open a split; raises one `InputError` with all problems that show without reading features in full."""
        if self._packed is not None:
            split = self._packed.split(name)
            if expected_dim is not None and split.feature_dim != expected_dim:
                raise InputError(
                    f"{self._recipe.data_dir}: expected D = {expected_dim}, found {split.feature_dim}; use the "
                    "features the model was trained with"
                )
            return split
        clips = read_split(
            Path(self._recipe.data_dir),
            annotations_of(self._recipe),
            name,
            allow_missing=self._recipe.allow_missing,
            log=self._log,
            expected_dim=expected_dim,
        )
        return folder_split(name, clips, feature_dim(clips), Path(self._recipe.data_dir))


def is_packed(data_dir: str) -> bool:
    """Tell whether a corpus is packed: it lies at an address, or its folder has a manifest."""
    return "://" in data_dir or (Path(data_dir) / MANIFEST).is_file()


def annotations_of(recipe: CorpusRecipe) -> str:
    """Return where the annotations are: as the recipe says, else DATA_DIR/annotations, else DATA_DIR."""
    if recipe.annotations:
        return recipe.annotations
    beside = Path(recipe.data_dir) / "annotations"
    return str(beside if beside.is_dir() else recipe.data_dir)
