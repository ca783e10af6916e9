"""Rendering: invented signing as small videos of a head, a body and two hands.

What a camera would see of the latent movements of `trainer.data.signing`: places move the hands, shapes turn, stretch
and shade them, the face opens its mouth and eyes. Skin, clothes and background belong to the signer.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trainer.data.signing import BODY, FACE, OTHER_PLACE, OTHER_SHAPE, PLACE, SHAPE

Floats = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]

_NOISE_LEVELS = 6.0
"""Levels of a pixel that one unit of sensor noise moves it."""


def render(movement: Floats, *, size: int, signer: int, noise: float, rng: np.random.Generator) -> Pixels:
    """Render a movement `[T, L]` as frames `[T, size, size, 3]`.

    `noise` is the deviation of the sensor's noise, in the units of the movement; two frames never show quite the same.
    """
    # The signer's own looks: the same in every clip of a corpus, whatever is drawn for the clip.
    looks = np.random.default_rng([signer, 77])
    skin = np.array([215.0, 170.0, 140.0]) + looks.uniform(-35.0, 25.0)
    clothes, wall = looks.uniform(20.0, 110.0, 3), looks.uniform(110.0, 190.0, 3)
    axis = (np.arange(size) + 0.5) / size * 2.0 - 1.0
    across, down = axis[None, None, :], axis[None, :, None]
    frames = np.broadcast_to(wall * (1.0 - 0.1 * axis[:, None, None]), (len(movement), size, size, 3)).copy()
    sway = 0.08 * np.tanh(movement[:, BODY])
    middle, height = sway[:, 0], sway[:, 1]

    def paint(x: Floats, y: Floats, radii: tuple[Floats, Floats], angle: Floats, color: Floats) -> None:
        """Paint an ellipse into each frame, its edge a pixel soft."""
        dx, dy = across - x[:, None, None], down - y[:, None, None]
        cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
        long, short = (radius[:, None, None] for radius in radii)
        distance = np.hypot((dx * cos + dy * sin) / long, (dy * cos - dx * sin) / short)
        cover = np.clip((1.0 - distance) * np.minimum(long, short) * size / 2 + 0.5, 0.0, 1.0)[..., None]
        np.add(frames * (1.0 - cover), color.reshape(-1, 1, 1, 3) * cover, out=frames)

    def same(value: float) -> Floats:
        return np.full(len(movement), value)

    paint(middle, 0.75 + height, (same(0.5), same(0.65)), sway[:, 2], clothes)
    paint(middle, -0.45 + height, (same(0.24), same(0.3)), sway[:, 2], skin)
    face = np.tanh(movement[:, FACE])
    mouth_height = 0.045 + 0.035 * face[:, 0]
    paint(middle, -0.32 + height, (0.1 + 0.04 * face[:, 1], mouth_height), same(0.0), np.array([120.0, 30.0, 40.0]))
    for side in (-1.0, 1.0):
        eye = 0.04 + 0.02 * face[:, 2]
        paint(middle + side * 0.1, -0.52 + 0.04 * face[:, 3] + height, (same(0.05), eye), same(0.0), np.zeros(3))
    for place, shape, side in ((OTHER_PLACE, OTHER_SHAPE, -1.0), (PLACE, SHAPE, 1.0)):
        at, form = np.tanh(0.5 * movement[:, place]), np.tanh(0.8 * movement[:, shape])
        x, y = side * 0.3 + 0.65 * at[:, 0], -0.85 * at[:, 1]
        # Nearer hands are larger; fingers stretch the palm, the wrist turns it, its inside is lighter.
        scale = 0.17 * (1.0 + 0.25 * at[:, 2])
        radii = (scale * (1.0 + 0.5 * form[:, 0]), scale * (1.0 - 0.3 * form[:, 0]))
        turn = 1.4 * form[:, 1]
        shade = skin + 35.0 * form[:, 2, None] * np.array([1.0, 0.6, 0.2])
        paint(x, y, radii, turn, shade)
        # The thumb tells a turned hand from its mirror image.
        thumb = turn + 1.2 + form[:, 3]
        reach = scale * (1.1 + 0.3 * form[:, 3])
        paint(x + reach * np.cos(thumb), y + reach * np.sin(thumb), (0.45 * scale, 0.3 * scale), thumb, shade - 40.0)
    frames += rng.normal(0.0, noise * _NOISE_LEVELS, frames.shape)
    return np.clip(np.rint(frames), 0.0, 255.0).astype(np.uint8)
