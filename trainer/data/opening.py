"""From a recipe to the splits of a corpus, whether it lies in a file per clip or packed, here or in an object store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trainer.data.annotations import find_annotation_file
from trainer.data.corpus import feature_dim, read_split
from trainer.data.features import Moments
from trainer.data.shards.format import MANIFEST
from trainer.data.shards.packed import PackedCorpus
from trainer.data.shards.store import open_store
from trainer.data.table import Split, folder_split
from trainer.data.video.sources import is_video_corpus
from trainer.data.video.table import read_video_split
from trainer.errors import InputError
from trainer.recipe import VIDEO_MODELS, CorpusRecipe

Log = Callable[[str], None]


class OpenCorpus:
    """A corpus whose splits can be asked for."""

    def __init__(self, recipe: CorpusRecipe, log: Log, *, video: bool | None = None) -> None:
        """Open the corpus; raises `InputError` if there is none.

        `video`: whether the model takes frames (True) or features; splits of the other kind are refused.
        """
        self._recipe, self._log, self._video = recipe, log, video
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
            self._check_kind(is_video=False)
            split = self._packed.split(name)
            if expected_dim is not None and split.feature_dim != expected_dim:
                raise InputError(
                    f"{self._recipe.data_dir}: expected D = {expected_dim}, found {split.feature_dim}; use the "
                    "features the model was trained with"
                )
            return split
        recipe, folder, annotations = self._recipe, Path(self._recipe.data_dir), annotations_of(self._recipe)
        is_video = is_video_corpus(folder, annotations, name, wanted=self._video)
        if self._video and not is_video:
            # Without annotations nothing was looked for: say that, and not what the folder seems to hold.
            find_annotation_file(annotations, name)
        self._check_kind(is_video=is_video)
        if is_video:
            # Whatever their size, frames are brought to the recipe's.
            return read_video_split(
                folder,
                annotations,
                name,
                frame_size=recipe.frame_size,
                crop_size=recipe.frame_crop,
                allow_missing=recipe.allow_missing,
                log=self._log,
            )
        clips = read_split(
            folder,
            annotations,
            name,
            allow_missing=recipe.allow_missing,
            log=self._log,
            expected_dim=expected_dim,
        )
        return folder_split(name, clips, feature_dim(clips), folder)

    def _check_kind(self, *, is_video: bool) -> None:
        """Refuse video for a model of features, and features for a model of video."""
        where = self._recipe.data_dir
        if is_video and self._video is False:
            raise InputError(
                f"{where}: holds video, the model takes features; choose a model of video "
                f"(--model {', '.join(sorted(VIDEO_MODELS))}), or name the corpus of features"
            )
        if not is_video and self._video:
            raise InputError(
                f"{where}: holds features, the model takes video; choose a model of features (--model teacher or "
                "student), or name the corpus of frames"
            )


def is_packed(data_dir: str) -> bool:
    """Tell whether a corpus is packed: it lies at an address, or its folder has a manifest."""
    return "://" in data_dir or (Path(data_dir) / MANIFEST).is_file()


def annotations_of(recipe: CorpusRecipe) -> str:
    """Return where the annotations are: as the recipe says, else DATA_DIR/annotations(/manual), else DATA_DIR.

    PHOENIX keeps its own in annotations/manual, beside automatic ones.
    """
    if recipe.annotations:
        return recipe.annotations
    beside = Path(recipe.data_dir) / "annotations"
    places = (beside / "manual", beside)
    return str(next((place for place in places if place.is_dir()), recipe.data_dir))
