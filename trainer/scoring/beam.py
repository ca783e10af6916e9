"""CTC prefix beam search (Hannun et al. 2014), with an n-gram language model where there is one.

The best path takes the best alignment; a gloss sequence has many, and this search adds them up. Written here because no
library serves: pyctcdecode 0.5.0 spells words from characters and holds numpy below 2, flashlight-text 0.0.7 comes for
Linux alone and leaves the language model to kenlm, which has to be compiled; both rest since 2023 and 2024.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainer.scoring.decoding import Emission, align
from trainer.scoring.lm import LanguageModel

Floats = npt.NDArray[np.floating]
Scores = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """What a gloss sequence is worth beside its CTC score: `weight * ln P(glosses, end) + insertion * glosses`."""

    model: LanguageModel
    """The language model."""
    weight: float = 0.5
    """Weight of its score."""
    insertion: float = 0.0
    """Reward of every gloss, in nats; a language model alone favours short sequences."""


class _Prefixes:
    """A tree of gloss sequences: equal sequences are one node, however they came about."""

    def __init__(self) -> None:
        self.parents, self.labels = [-1], [0]
        self._children: dict[tuple[int, int], int] = {}

    def child(self, node: int, label: int) -> int:
        """Return the sequence that is longer by one gloss."""
        found = self._children.setdefault((node, label), len(self.parents))
        if found == len(self.parents):
            self.parents.append(node)
            self.labels.append(label)
        return found

    def glosses(self, node: int) -> list[int]:
        """Return the classes of a sequence."""
        backwards = []
        while node:
            backwards.append(self.labels[node])
            node = self.parents[node]
        return backwards[::-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Beam:
    """The K sequences kept after a frame."""

    nodes: list[int]
    """Their nodes in the tree."""
    in_blank: Scores
    """ln of the probability of all alignments that end in the blank, [K]."""
    in_gloss: Scores
    """The same of those that end in the last gloss, [K]."""
    worth: Scores
    """What each is worth beside that, [K]."""


def search(log_probs: Floats, width: int, fusion: Fusion | None = None) -> list[int]:
    """Return the classes of the best gloss sequence found among `width` at a time; class 0 is the blank.

    `log_probs` `[T, V]` in nats, of one clip, none of them NaN; reckoned in float64. Exact where `width` is not
    smaller than the number of sequences that T frames can spell.
    """
    prefixes = _Prefixes()
    beam = _Beam(nodes=[0], in_blank=np.zeros(1), in_gloss=np.full(1, -np.inf), worth=np.zeros(1))
    states = {0: fusion.model.start} if fusion else {}
    for frame in np.asarray(log_probs, dtype=np.float64):
        gains = np.zeros((len(beam.nodes), 1))
        if fusion:
            scores = np.stack([fusion.model.scores(states[node]) for node in beam.nodes])
            gains = fusion.weight * scores + fusion.insertion
        beam = _advance(beam, frame, gains, width, prefixes)
        if fusion:
            for node in beam.nodes:
                if node not in states:
                    states[node] = fusion.model.advance(states[prefixes.parents[node]], prefixes.labels[node])
    final = np.logaddexp(beam.in_blank, beam.in_gloss) + beam.worth
    if fusion:
        final = final + [fusion.weight * fusion.model.scores(states[node])[0] for node in beam.nodes]
    return prefixes.glosses(beam.nodes[int(final.argmax())])


def _advance(beam: _Beam, frame: Scores, gains: Scores, width: int, prefixes: _Prefixes) -> _Beam:
    """Take in a frame `[V]`: sequences stay or grow by a gloss, which adds `gains` `[K, V]` to their worth."""
    last = np.array([prefixes.labels[node] for node in beam.nodes])
    total = np.logaddexp(beam.in_blank, beam.in_gloss)
    in_blank, in_gloss = total + frame[0], beam.in_gloss + frame[last]
    grown = total[:, None] + frame
    # The same gloss again is another one only after a blank.
    grown[np.arange(len(last)), last] = beam.in_blank + frame[last]
    grown[:, 0] = -np.inf
    places = {node: place for place, node in enumerate(beam.nodes)}
    for place, node in enumerate(beam.nodes):
        origin = places.get(prefixes.parents[node])
        if origin is not None:
            # Grown by this gloss, one sequence of the beam is another one of it.
            in_gloss[place] = np.logaddexp(in_gloss[place], grown[origin, last[place]])
            grown[origin, last[place]] = -np.inf
    worth = beam.worth[:, None] + np.broadcast_to(gains, grown.shape)
    best = _largest(np.concatenate([np.logaddexp(in_blank, in_gloss) + beam.worth, (grown + worth).ravel()]), width)
    stays = best[best < len(last)]
    origins, labels = np.divmod(best[best >= len(last)] - len(last), len(frame))
    grew = (origins, labels)
    return _Beam(
        nodes=[beam.nodes[place] for place in stays]
        + [
            prefixes.child(beam.nodes[origin], label)
            for origin, label in zip(*map(np.ndarray.tolist, grew), strict=True)
        ],
        in_blank=np.concatenate([in_blank[stays], np.full(len(labels), -np.inf)]),
        in_gloss=np.concatenate([in_gloss[stays], grown[grew]]),
        worth=np.concatenate([beam.worth[stays], worth[grew]]),
    )


def _largest(scores: Scores, width: int) -> npt.NDArray[np.intp]:
    """Return the places of the `width` largest scores above minus infinity, in a fixed order."""
    places = np.argpartition(scores, -width)[-width:] if width < len(scores) else np.arange(len(scores))
    return np.sort(places[scores[places] > -np.inf])


@dataclass(frozen=True, kw_only=True)
class BeamSearch:
    """The decoder of the final evaluation: the best gloss sequence, timed by its best alignment."""

    width: int = 10
    """Gloss sequences kept after each frame."""
    fusion: Fusion | None = None
    """Language model, if there is one."""

    def __call__(self, log_probs: Floats) -> list[Emission]:
        """Decode one clip, `[T, V]`; raises ValueError where the model gave NaN."""
        if np.isnan(log_probs).any():
            raise ValueError("log-probabilities are NaN")
        return align(log_probs, search(log_probs, self.width, self.fusion))
