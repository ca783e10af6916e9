"""Invented signing, as pure functions of seeds: a language, its signers, and the sensor that watches them.

Signs are composed as sign phonology composes them (Stokoe, 1960: handshape, location, movement, and what the
face does), out of small inventories, so that glosses share parts and some differ in one part only. A sentence
is one continuous movement through the way-points of its glosses. Movements live in 21 latent dimensions, `L`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Latent columns of the articulators: body (3), each hand's place (3) and shape (4), face (4).
BODY, PLACE, SHAPE, OTHER_PLACE, OTHER_SHAPE, FACE = (
    np.arange(*bounds) for bounds in ((0, 3), (3, 6), (6, 10), (10, 13), (13, 17), (17, 21))
)
LATENTS = 21
WAYPOINTS = 3
ANCHORS = 2
"""Glosses of a sentence that the clip's number dictates; going round, they reach every gloss of the language."""
SUCCESSORS = 8
_MIRROR = np.array([-1.0, 1.0, 1.0])
_REST = np.zeros(LATENTS)
_REST[PLACE] = _REST[OTHER_PLACE] = (0.3, -1.5, 0.0)
# Streams of seeds: what one part draws never shifts what another draws.
_LANGUAGE, _SIGNER, _SENSOR = 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class Language:
    """Hold what every clip shares: how glosses are signed and which gloss follows which."""

    waypoints: Floats
    """Targets of each gloss, [V, 3, L]."""
    durations: Floats
    """Relative durations of the glosses, [V]."""
    successors: Ints
    """The glosses that may follow each gloss, [V, S]: a sparse bigram grammar, never the gloss itself."""
    successor_mass: Floats
    """Their probabilities, [V, S]."""
    anchors: Ints
    """The order in which clips are given their anchor glosses, a permutation [V]."""


@dataclass(frozen=True, kw_only=True)
class Signer:
    """Hold how one person signs."""

    tempo: float
    """Pace of the glosses against that of transitions and rests; 1 is usual."""
    amplitude: float
    """Size of all movements; 1 is usual."""
    mirroring: float
    """How far the other hand follows the dominant one in one-handed glosses, 0 to 1."""
    style: Floats
    """Linear change of every movement, [L, L], near the identity."""
    posture: Floats
    """Constant offset, [L]."""


@dataclass(frozen=True, kw_only=True)
class Sensor:
    """Hold how movements become features; streams are pose, hands, face, temporal, in this order."""

    streams: dict[str, tuple[int, int]]
    """Where each stream begins and ends in the feature dimension."""
    mixing: Floats
    """Latents to coordinates, [L, C]; each stream sees its own articulators."""
    gains: Floats
    """Units of each coordinate, [C]: from a hundredth to ten, 0 for the constant ones."""
    offsets: Floats
    """Raw value of each coordinate at rest, [C]."""
    derivatives: int
    """Orders of temporal difference appended to the coordinates."""


def invent_language(vocabulary_size: int, seed: int) -> Language:
    """Invent a language of `vocabulary_size` glosses, number 0 the most frequent (about Zipf)."""
    rng = np.random.default_rng([seed, _LANGUAGE])
    # Every second gloss is the one before it backwards (open and close, come and go): telling those apart
    # takes the order of the frames, not their average.
    pairs = -(-vocabulary_size // 2)
    places = rng.normal(0.0, 0.7, (8, 1, 3))
    shapes = rng.normal(0.0, 0.8, (8, 4))
    mouthings = rng.normal(0.0, 0.6, (6, 1, 4))
    stretch = rng.normal(size=(8, 3))
    stretch *= 1.5 / np.linalg.norm(stretch, axis=1, keepdims=True)
    movements = np.stack([-stretch, rng.normal(0.0, 1.0, (8, 3)), stretch], axis=1)

    def pick(inventory: Floats) -> Floats:
        # Dealt rather than drawn: no language is much more ambiguous than the next.
        return inventory[rng.permutation(np.arange(pairs) % len(inventory))]

    signs = np.tile(_REST, (pairs, WAYPOINTS, 1))
    signs[:, :, PLACE] = pick(places) + pick(movements)
    first, last = pick(shapes), pick(shapes)
    last = np.where(rng.random((pairs, 1)) < 0.6, first, last)
    signs[:, :, SHAPE] = np.stack([first, (first + last) / 2, last], axis=1)
    signs[:, :, FACE] = pick(mouthings)
    two_handed = rng.random(pairs) < 0.4
    signs[two_handed] = _follow(signs[two_handed], 1.0)
    waypoints = np.stack([signs, signs[:, ::-1]], axis=1).reshape(-1, WAYPOINTS, LATENTS)[:vocabulary_size]
    # Large vocabularies exhaust the inventories: a little of every gloss is its own.
    waypoints += rng.normal(0.0, 0.15, waypoints.shape)

    unigram = 1.0 / (np.arange(vocabulary_size) + 2.7)
    successors = np.empty((vocabulary_size, min(SUCCESSORS, vocabulary_size - 1)), dtype=np.int64)
    for gloss in range(vocabulary_size):
        chances = np.where(np.arange(vocabulary_size) == gloss, 0.0, unigram)
        successors[gloss] = rng.choice(vocabulary_size, successors.shape[1], replace=False, p=chances / chances.sum())
    mass = unigram[successors] * rng.gamma(1.0, size=successors.shape)
    return Language(
        waypoints=waypoints,
        durations=rng.uniform(0.8, 1.3, vocabulary_size),
        successors=successors,
        successor_mass=mass / mass.sum(axis=1, keepdims=True),
        anchors=rng.permutation(vocabulary_size),
    )


def invent_signer(index: int, seed: int) -> Signer:
    """Invent the signer of this index; how many others there are changes nothing."""
    rng = np.random.default_rng([seed, _SIGNER, index])
    return Signer(
        tempo=float(np.exp(rng.normal(0.0, 0.12))),
        amplitude=float(np.exp(rng.normal(0.0, 0.1))),
        mirroring=float(rng.uniform(0.0, 0.4)),
        style=np.eye(LATENTS) + rng.normal(0.0, 0.03, (LATENTS, LATENTS)),
        posture=rng.normal(0.0, 0.1, LATENTS),
    )


def invent_sensor(feature_dim: int, derivatives: int, shares: Sequence[float], seed: int) -> Sensor:
    """Invent a sensor of `feature_dim` features; `shares` divide its coordinates into pose, hands, face."""
    rng = np.random.default_rng([seed, _SENSOR])
    coordinates = feature_dim - derivatives * (feature_dim // (derivatives + 1))
    pose, hands = (int(bound) for bound in np.rint(np.cumsum(shares)[:2] / sum(shares) * coordinates))
    streams = {"pose": (0, pose), "hands": (pose, hands), "face": (hands, coordinates)}
    if derivatives:
        streams["temporal"] = (coordinates, feature_dim)
    middle = (pose + hands) // 2
    mixing = np.zeros((LATENTS, coordinates))
    for begin, end, seen in (
        (0, pose, np.concatenate([BODY, PLACE, OTHER_PLACE])),
        (pose, middle, np.concatenate([OTHER_PLACE, OTHER_SHAPE])),
        (middle, hands, np.concatenate([PLACE, SHAPE])),
        (hands, coordinates, np.concatenate([FACE, BODY])),
    ):
        mixing[seen, begin:end] = rng.normal(0.0, len(seen) ** -0.5, (len(seen), end - begin))
    gains = 10.0 ** rng.uniform(-2.0, 1.0, coordinates)
    # Real extractors have dimensions that never move: whoever divides by their deviation should notice here.
    # They lie in the face, since a lost hand would move them.
    gains[hands + rng.choice(coordinates - hands, size=max(1, coordinates // 200), replace=False)] = 0.0
    offsets = rng.uniform(-2.0, 2.0, coordinates) * np.where(gains > 0.0, gains, 1.0)
    return Sensor(streams=streams, mixing=mixing, gains=gains, offsets=offsets, derivatives=derivatives)


def compose_sentence(
    language: Language, number: int, num_glosses: int, num_repeats: int, rng: np.random.Generator
) -> list[int] | None:
    """Compose `num_glosses` glosses, or return None where chance breaks a rule (draw again then).

    Two phrases, each a walk through the grammar from one anchor gloss of clip `number`; then `num_repeats`
    glosses are signed twice in a row, and no others.
    """
    distinct = num_glosses - num_repeats
    starts = language.anchors[(ANCHORS * number + np.arange(ANCHORS)) % len(language.anchors)]
    second_phrase = int(rng.integers(1, distinct))
    sentence = [int(starts[0])]
    for place in range(1, distinct):
        following, mass = language.successors[sentence[-1]], language.successor_mass[sentence[-1]]
        gloss = starts[1] if place == second_phrase else rng.choice(following, p=mass)
        if gloss == sentence[-1]:
            return None
        sentence.append(int(gloss))
    times = 1 + rng.multinomial(num_repeats, np.full(distinct, 1.0 / distinct))
    return np.repeat(sentence, times).tolist()


def perform(
    language: Language, signer: Signer, glosses: Sequence[int], num_frames: int, rng: np.random.Generator
) -> Floats:
    """Sign a sentence in `num_frames` frames: the movement [T, L] from rest to rest.

    Way-points are joined by minimum-jerk strokes (Flash and Hogan, 1985), so that what lies between two
    glosses is the path from one to the other. Neighbours pull at each other's edges (assimilation), and
    inertia rounds off what is signed fast (undershoot).
    """
    targets = language.waypoints[glosses] + rng.normal(0.0, 0.1, (len(glosses), WAYPOINTS, LATENTS))
    pull = 0.2 * (targets[1:, 0] - targets[:-1, -1])
    targets[1:, 0] -= pull
    targets[:-1, -1] += pull
    knots = np.concatenate([[_REST, _REST], targets.reshape(-1, LATENTS), [_REST, _REST]])
    strokes = language.durations[glosses] * rng.uniform(0.8, 1.2, len(glosses)) / signer.tempo
    transitions = rng.uniform(0.3, 0.5, len(glosses) + 1)
    rests = rng.uniform(0.2, 0.8, 2)
    steps = np.stack([transitions[:-1], *[strokes / (WAYPOINTS - 1)] * (WAYPOINTS - 1)], axis=1)
    times = np.cumsum(np.concatenate([[0.0, rests[0]], steps.ravel(), [transitions[-1], rests[1]]]))
    times *= (num_frames - 1) / times[-1]
    frames = np.arange(num_frames)
    before = np.clip(np.searchsorted(times, frames, side="right") - 1, 0, len(knots) - 2)
    way = np.clip((frames - times[before]) / (times[before + 1] - times[before]), 0.0, 1.0)[:, None]
    movement = knots[before] + way**3 * (10 - 15 * way + 6 * way**2) * (knots[before + 1] - knots[before])
    padded = np.concatenate([movement[:1], movement, movement[-1:]])
    movement = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    movement = _follow(movement, signer.mirroring, keep=1.0 - signer.mirroring)
    # The body sways and the face has a life of its own: slow movement that says nothing about the glosses.
    for columns, size in ((BODY, 0.3), (FACE, 0.3)):
        phases, periods = rng.uniform(0, 2 * np.pi, len(columns)), rng.uniform(10, 60, len(columns))
        movement[:, columns] += size * np.sin(2 * np.pi * frames[:, None] / periods + phases)
    return np.asarray(signer.amplitude * movement @ signer.style + signer.posture)


def observe(
    sensor: Sensor, movement: Floats, noise: float, dropout: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Turn a movement [T, L] into raw features float32 [T, D]: noisy, in odd units, hands lost now and then."""
    seen = np.tanh(movement @ sensor.mixing)
    seen = (seen + rng.normal(0.0, noise, seen.shape)) * sensor.gains + sensor.offsets
    begin, end = sensor.streams["hands"]
    middle = (begin + end) // 2
    for hand in (slice(begin, middle), slice(middle, end)):
        for frame in np.flatnonzero(rng.random(len(seen)) < dropout):
            seen[frame : frame + rng.integers(1, 5), hand] = 0.0
    features = [seen]
    if sensor.derivatives:
        first, last = sensor.streams["temporal"]
        difference = seen[:, : (last - first) // sensor.derivatives]
        for _ in range(sensor.derivatives):
            difference = np.diff(difference, axis=0, prepend=difference[:1])
            features.append(difference)
    return np.concatenate(features, axis=1).astype(np.float32)


def _follow(movement: Floats, share: float, keep: float = 0.0) -> Floats:
    """Let the other hand do `share` of what the dominant one does, mirrored, and `keep` of its own."""
    movement = movement.copy()
    movement[..., OTHER_PLACE] = keep * movement[..., OTHER_PLACE] + share * _MIRROR * movement[..., PLACE]
    movement[..., OTHER_SHAPE] = keep * movement[..., OTHER_SHAPE] + share * movement[..., SHAPE]
    return movement
