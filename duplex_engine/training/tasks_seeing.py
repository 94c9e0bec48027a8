"""Tasks of seeing: a light changes colour, a shape appears, a lamp blinks.

Owns how the pictures are drawn. One picture of 40 x 39 pixels a micro-turn, which is one patch.
Event: ``see``; the model says it in the micro-turn that brings the picture.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from duplex_engine.training import phrases
from duplex_engine.training.stage import PICTURE, TURN_S, Picture, Stage
from duplex_engine.training.vocabulary import encode

__all__ = ["HEIGHT", "WIDTH", "draw_disc", "draw_shape", "seeing_scene"]

HEIGHT, WIDTH = 40, 39
LIGHTS = {"red": (225, 35, 30), "green": (40, 200, 60), "blue": (40, 70, 225)} | {
    "yellow": (235, 215, 40)
}
Canvas = NDArray[np.float64]
Draw = Callable[[Canvas], None]

_ROWS, _COLUMNS = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float64)


def draw_disc(
    canvas: Canvas, row: float, column: float, radius: float, colour: tuple[float, ...]
) -> None:
    """A filled disc with a soft edge."""
    distance = np.hypot(_ROWS - row, _COLUMNS - column)
    inside = np.clip(radius + 0.5 - distance, 0, 1)[..., None]
    canvas[:] = canvas * (1 - inside) + inside * np.array(colour)


def draw_shape(
    canvas: Canvas,
    name: str,
    row: float,
    column: float,
    radius: float,
    colour: tuple[float, ...],
) -> None:
    """The outline of a circle, square or triangle."""
    y, x = _ROWS - row, _COLUMNS - column
    if name == "circle":
        distance = np.hypot(y, x) - radius
    elif name == "square":
        distance = np.maximum(abs(y), abs(x)) - 0.85 * radius
    else:  # a triangle that stands on its base
        slope = np.sqrt(0.75)
        distance = np.maximum(y - 0.6 * radius, slope * abs(x) - 0.5 * y - 0.5 * radius)
    on_line = np.clip(2.0 - abs(distance), 0, 1)[..., None]
    canvas[:] = canvas * (1 - on_line) + on_line * np.array(colour)


class _Film:
    """A scene filmed by a still camera: one background, light noise in every picture."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        base = rng.uniform(10, 90) + rng.uniform(-12, 12, 3)
        slope = rng.uniform(-0.8, 0.8, 2)
        shade = slope[0] * (_ROWS - 20) + slope[1] * (_COLUMNS - 20)
        self._background = base + shade[..., None]
        self._noise = rng.uniform(0, 8)
        self.row = float(rng.uniform(14, 26))
        self.column = float(rng.uniform(14, 25))
        self.radius = float(rng.uniform(6, 12))

    def picture(self, draw: Draw) -> Picture:
        """The background with something on it."""
        canvas = self._background.copy()
        draw(canvas)
        canvas += self._rng.normal(0, self._noise, canvas.shape)
        return np.asarray(np.clip(np.rint(canvas), 0, 255), np.uint8)

    def disc(self, colour: tuple[float, ...]) -> Draw:
        """Draws the lamp in this colour."""
        return lambda canvas: draw_disc(canvas, self.row, self.column, self.radius, colour)

    def shape(self, name: str, colour: tuple[float, ...]) -> Draw:
        """Draws an outline."""
        return lambda canvas: draw_shape(canvas, name, self.row, self.column, self.radius, colour)


def seeing_scene(stage: Stage) -> None:
    """Something in the picture changes, sometimes while somebody talks: the model says what."""
    film = _Film(stage.rng)
    plan = stage.pick((_lights, _shapes, _blinks))(stage, film)
    first = int(stage.time_s / TURN_S) + 1
    for offset, (draw, word) in enumerate(plan):
        turn = first + offset
        stage.images[turn] = film.picture(draw)
        if word is not None:
            stage.emit("see", turn * TURN_S, turn, encode(word), window_turns=2, source=PICTURE)
    end_s = (first + len(plan)) * TURN_S
    while stage.chance(0.5) and stage.time_s < end_s - 2.0:
        sentences = stage.chatter()
        if not sentences:
            break
        stage.wait(0.1, 1.0)
        stage.say(stage.pick(sentences))
    stage.time_s = max(stage.time_s, end_s)
    stage.wait(0.6, 1.5)


Plan = list[tuple[Draw, str | None]]


def _lights(stage: Stage, film: _Film) -> Plan:
    """A grey light takes a colour, once or several times."""
    grey = float(stage.rng.uniform(90, 150))
    off = film.disc((grey, grey, grey))
    plan: Plan = [(off, None)] * int(stage.rng.integers(3, 10))
    for _ in range(int(stage.rng.integers(1, 4))):
        name = stage.pick(tuple(LIGHTS))
        on = film.disc(tuple(np.array(LIGHTS[name]) + stage.rng.uniform(-20, 20, 3)))
        plan += [(on, name)] + [(on, None)] * int(stage.rng.integers(1, 7))
        plan += [(off, None)] * int(stage.rng.integers(2, 7))
    return plan


def _shapes(stage: Stage, film: _Film) -> Plan:
    """An outline appears in an empty picture."""
    nothing = _draw_nothing
    plan: Plan = [(nothing, None)] * int(stage.rng.integers(3, 10))
    for _ in range(int(stage.rng.integers(1, 4))):
        name = stage.pick(phrases.SHAPES)
        shown = film.shape(name, tuple(stage.rng.uniform(150, 255, 3)))
        plan += [(shown, name)] + [(shown, None)] * int(stage.rng.integers(1, 7))
        plan += [(nothing, None)] * int(stage.rng.integers(2, 7))
    return plan


def _blinks(stage: Stage, film: _Film) -> Plan:
    """A dark lamp flashes white; the model counts aloud."""
    off, on = film.disc((25, 25, 25)), film.disc((245, 245, 240))
    plan: Plan = [(off, None)] * int(stage.rng.integers(3, 8))
    for number in phrases.NUMBERS[: int(stage.rng.integers(2, 9))]:
        plan += [(on, number)] + [(on, None)] * int(stage.rng.integers(0, 2))
        plan += [(off, None)] * int(stage.rng.integers(1, 5))
    return plan


def _draw_nothing(_: Canvas) -> None:
    """An empty picture."""
