"""Sound in micro-turns, from a file or a microphone, driven through a session.

Owns the pace. Does not own what is shown: see `live.py`.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray
from PIL import Image, ImageOps

from duplex_engine.arrays import SAMPLE_RATE
from duplex_engine.cli.live import View
from duplex_engine.config import ModelConfig
from duplex_engine.errors import BackendUnavailable, InvalidArgument
from duplex_engine.session import Session

__all__ = ["Sound", "file_sound", "fitted_image", "microphone_sound", "stream"]


@dataclass(frozen=True, slots=True)
class Sound:
    """A source: pieces (n, channels) of float32 samples, each as long as a micro-turn."""

    sample_rate: int
    pieces: Iterable[NDArray[np.float32]]
    is_live: bool  # the pieces come no faster than they last


def file_sound(path: Path, turn_ms: int) -> Sound:
    """A sound file, read piece by piece; the last piece may be short.

    Raises:
        InvalidArgument: it is not there, or no sound file; once it is read, damaged.
    """

    def pieces(file: soundfile.SoundFile) -> Iterator[NDArray[np.float32]]:
        with file:
            n_read = 0
            for k in itertools.count(1):
                # Rounded in total, so that rates that do not divide evenly do not drift.
                end = k * turn_ms * file.samplerate // 1000
                try:
                    piece = file.read(end - n_read, dtype="float32", always_2d=True)
                except soundfile.LibsndfileError as error:
                    raise InvalidArgument(
                        f"{path}: expected a whole sound file, found damage behind "
                        f"{n_read / file.samplerate:.1f} s: {error}"
                    ) from error
                n_read = end
                if not len(piece):
                    return
                yield piece

    try:
        path.stat()  # of a file that is not there libsndfile says "System error"
        file = soundfile.SoundFile(os.fsencode(path))  # as a string only names in Unicode
    except (soundfile.LibsndfileError, OSError, TypeError) as error:
        raise InvalidArgument(f"{path}: expected a sound file, found: {error}") from error
    return Sound(file.samplerate, pieces(file), is_live=False)


def microphone_sound(turn_ms: int) -> Sound:
    """The default microphone, until the caller stops asking.

    Raises:
        BackendUnavailable: `sounddevice` or the microphone is not there.
    """
    try:
        import sounddevice
    except (ImportError, OSError) as error:  # OSError: the package without its library
        raise BackendUnavailable(
            f"--mic: expected the package sounddevice, found: {error}; "
            "pip install 'duplex_engine[mic]'"
        ) from error

    def pieces() -> Iterator[NDArray[np.float32]]:
        n = turn_ms * SAMPLE_RATE // 1000
        try:
            with sounddevice.InputStream(SAMPLE_RATE, channels=1, dtype="float32") as microphone:
                while True:
                    samples, _ = microphone.read(n)
                    yield samples
        except sounddevice.PortAudioError as error:
            raise BackendUnavailable(f"--mic: expected a microphone, found: {error}") from error

    return Sound(SAMPLE_RATE, pieces(), is_live=True)


def fitted_image(path: Path, config: ModelConfig, view: View) -> NDArray[np.uint8]:
    """A picture file as (height, width, 3) RGB, made smaller if a micro-turn cannot hold it.

    Raises:
        InvalidArgument: not a picture, or the checkpoint takes none.
    """
    if config.vision is None:
        raise InvalidArgument(f"{path}: expected a checkpoint that sees, found no vision_config")
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file).convert("RGB")  # as the camera was held
    except Exception as error:  # Pillow raises nothing narrower for all kinds of damage
        raise InvalidArgument(f"{path}: expected a picture, found: {error}") from error
    if config.interaction is not None:
        patch, limit = config.vision.patch_size, config.interaction.max_image_patches
        full = picture.size
        for percent in range(100, 0, -1):
            width, height = (max(side * percent // 100, 1) for side in full)
            if -(-height // patch) * (width // patch + 1) <= limit:
                break
        else:
            raise InvalidArgument(
                f"{path}: expected at most {limit} patches of {patch} pixels (max_image_patches), "
                f"found {full[0]}x{full[1]} pixels"
            )
        if percent < 100:
            picture = picture.resize((width, height))
            view.note(
                f"{path.name}: {full[0]}x{full[1]} made {width}x{height}, "
                f"to fit the {limit} patches of a micro-turn"
            )
    return np.asarray(picture)


def stream(
    session: Session,
    sound: Sound,
    view: View,
    turn_ms: int,
    *,
    images: Iterable[NDArray[np.uint8]] = (),
    text: str | None = None,
    realtime: bool = False,
) -> None:
    """Runs the whole stream: one picture per micro-turn from the first, `text` in the first.

    realtime: no piece is given before it would have been heard. A micro-turn that comes late by a
    whole one is left to the next, which merges them.
    """
    pictures = iter(images)
    waiting: list[NDArray[np.float32]] = []

    def step() -> None:
        turn = session.step(image=next(pictures, None), text=text if not n_steps else None)
        heard = np.concatenate(waiting) if waiting else np.zeros(0, np.float32)
        waiting.clear()
        view.show(turn, heard)

    n_steps = 0
    start = time.monotonic()
    for k, piece in enumerate(sound.pieces, start=1):
        session.feed(piece, sample_rate=sound.sample_rate)
        waiting.append(piece.mean(axis=1))
        if realtime and not sound.is_live:
            late_s = time.monotonic() - start - k * turn_ms / 1000
            if late_s >= turn_ms / 1000:
                continue
            time.sleep(max(-late_s, 0.0))
        step()
        n_steps += 1
    if waiting:
        step()
    if n_left := sum(1 for _ in pictures):
        view.note(f"{n_left} pictures were not shown: the sound ended before their micro-turn")
