"""What a microphone, a room and a telephone do to a stream: noise, echoes, filters, clipping.

Owns the changes to a finished stream. They leave the times of words as they are: the direct sound
of a room comes first, and filters have no delay. Pace and pitch are changed clip by clip, where
the times are known, by ``stage.py``; sounds that are events by themselves are in ``sounds.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import soxr

from duplex_engine.training.speech.sound import SAMPLE_RATE_HZ, Samples

if TYPE_CHECKING:
    from duplex_engine.training.bank import Bank

__all__ = ["augment", "babble_track"]

SNR_DB = (8.0, 40.0)
BABBLE_SNR_DB = (12.0, 28.0)
GAIN_DB = (-16.0, 8.0)
WANDER_DB = 5.0  # of the level, from second to second
EQ_DB = 9.0
EQ_POINTS_HZ = (0.0, 150.0, 500.0, 1500.0, 4000.0, 8000.0)
BAND_LIMIT_HZ = (3200.0, 4200.0)
CODEC_RATE_HZ = 8000
MU = 255.0
CLIP_AT = (0.06, 0.6)  # of the loudest sample
REVERB_S = (0.08, 0.7)  # until the echoes are 60 dB down
ROOM_S = 0.4  # length of the impulse response
RING = 1024  # samples of the equaliser's
NOISE_LOOP_S = 4.1  # coloured noise repeats after this
QUIET_RMS = 0.03  # what noise is measured against in a stream without speech
P_ROOM, P_EQ, P_BAND_LIMIT, P_CODEC, P_NOISE = 0.5, 0.8, 0.3, 0.5, 0.85
P_BABBLE, P_CLIP, P_WANDER = 0.3, 0.15, 0.4


def augment(samples: Samples, rng: np.random.Generator, babble: Samples | None = None) -> Samples:
    """A stream as another microphone would have heard it.

    Args:
        samples: (n,) at 16 kHz.
        rng: every choice comes from it.
        babble: people talking, for the background; see ``babble_track``.

    Returns:
        (n,) in [-1, 1].
    """
    if len(samples) == 0:
        return samples
    speech_rms = _active_rms(samples)
    band_limited = rng.random() < P_BAND_LIMIT
    sound = _filtered(samples, rng, band_limited)
    if rng.random() < P_WANDER:
        sound = sound * _wander(len(sound), rng)
    if rng.random() < P_NOISE:
        snr_db = rng.uniform(*SNR_DB)
        sound = sound + _level(_noise(len(sound), rng), speech_rms, snr_db)
    if babble is not None and rng.random() < P_BABBLE:
        talk = _loop(babble, len(sound), rng)
        sound = sound + _level(talk, speech_rms, rng.uniform(*BABBLE_SNR_DB))
    sound = sound * np.float32(10.0 ** (rng.uniform(*GAIN_DB) / 20.0))
    if rng.random() < P_CLIP:
        limit = float(np.abs(sound).max()) * rng.uniform(*CLIP_AT)
        sound = np.clip(sound, -limit, limit)
    if band_limited and rng.random() < P_CODEC:
        sound = _telephone(sound)
    return np.clip(sound, -1.0, 1.0).astype(np.float32, copy=False)


def babble_track(bank: Bank, rng: np.random.Generator, seconds: float, talkers: int = 5) -> Samples:
    """Several training voices talking at once, silence where a bank has none.

    Returns (seconds * 16000,), at any level.
    """
    n = round(seconds * SAMPLE_RATE_HZ)
    track = np.zeros(n, np.float32)
    phrases = bank.of_kind("phrase", "train") or bank.of_kind("word", "train")
    for _ in range(talkers if phrases else 0):
        position = 0
        while position < n:
            spoken = bank.load(phrases[int(rng.integers(len(phrases)))]).samples[: n - position]
            track[position : position + len(spoken)] += spoken
            position += len(spoken) + int(rng.uniform(0.05, 0.5) * SAMPLE_RATE_HZ)
    return track


def _active_rms(samples: Samples) -> float:
    """Level of the parts that are not silence: of frames less than 30 dB under the loudest."""
    hop = SAMPLE_RATE_HZ // 50
    usable = samples[: len(samples) // hop * hop].reshape(-1, hop)
    power = np.einsum("ij,ij->i", usable, usable) / hop
    loudest = float(power.max(initial=0.0))
    if loudest < 1e-8:
        return QUIET_RMS
    return float(np.sqrt(power[power > loudest * 1e-3].mean()))


def _fast_length(n: int) -> int:
    """The least number of at least ``n`` whose only prime factors are 2, 3 and 5."""
    best = 1 << (n - 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            two = three << max(0, (-(-n // three) - 1).bit_length())
            best = min(best, two)
            three *= 3
        five *= 5
    return best


def _filtered(samples: Samples, rng: np.random.Generator, band_limited: bool) -> Samples:
    """Room, equaliser and band limit, all in one filter."""
    room = _room(rng) if rng.random() < P_ROOM else None
    response = np.ones(RING // 2 + 1)
    hz = np.linspace(0.0, SAMPLE_RATE_HZ / 2, len(response))
    if rng.random() < P_EQ:
        points_db = rng.uniform(-EQ_DB, EQ_DB, len(EQ_POINTS_HZ))
        points_db -= points_db[1:-1].mean()  # the level is not the equaliser's business
        response *= 10.0 ** (np.interp(hz, EQ_POINTS_HZ, points_db) / 20.0)
    if band_limited:
        edge_hz = rng.uniform(*BAND_LIMIT_HZ)
        response /= 1.0 + (hz / edge_hz) ** 24
    # Symmetric about its middle, which is cut off again: no delay.
    impulse = np.roll(np.fft.irfft(response), RING // 2).astype(np.float32)
    if room is not None:
        impulse = _convolve(impulse, room)
    return _convolve(samples, impulse)[RING // 2 :][: len(samples)]


def _convolve(samples: Samples, impulse: Samples) -> Samples:
    """All of the convolution, in pieces that stay in the cache and are added where they overlap."""
    length = _fast_length(4 * len(impulse))
    hop = length - len(impulse) + 1
    pieces = np.zeros((-(-len(samples) // hop), hop), np.float32)
    pieces.reshape(-1)[: len(samples)] = samples
    filtered = np.fft.irfft(np.fft.rfft(pieces, length) * np.fft.rfft(impulse, length), length)
    total = np.zeros(len(pieces) * hop + len(impulse) - 1, np.float32)
    for number, piece in enumerate(filtered):
        total[number * hop :][:length] += piece
    return total[: len(samples) + len(impulse) - 1]


def _room(rng: np.random.Generator) -> Samples:
    """Impulse response: the direct sound, some early echoes, and a decaying tail of noise."""
    n = round(ROOM_S * SAMPLE_RATE_HZ)
    t = np.arange(n, dtype=np.float32) / SAMPLE_RATE_HZ
    decay = np.exp(-6.9 * t / rng.uniform(*REVERB_S))
    tail = rng.standard_normal(n, dtype=np.float32) * decay
    tail[: round(0.003 * SAMPLE_RATE_HZ)] = 0.0
    tail *= np.float32(10.0 ** (rng.uniform(-22.0, -4.0) / 20.0) / np.sqrt(np.sum(tail**2) + 1e-9))
    for _ in range(int(rng.integers(2, 7))):
        delay = int(rng.uniform(0.001, 0.03) * SAMPLE_RATE_HZ)
        tail[delay] += rng.uniform(-0.4, 0.4)
    tail[0] = 1.0
    return np.asarray(tail, dtype=np.float32)


def _noise(n: int, rng: np.random.Generator) -> Samples:
    """Noise between white and brown, at times with the hum of the mains. Returns (n,)."""
    length = _fast_length(round(NOISE_LOOP_S * SAMPLE_RATE_HZ))
    spectrum = np.fft.rfft(rng.standard_normal(length, dtype=np.float32))
    hz = np.fft.rfftfreq(length, 1.0 / SAMPLE_RATE_HZ)
    spectrum *= np.maximum(hz, 40.0) ** -rng.uniform(0.0, 1.0)
    loop = np.fft.irfft(spectrum, length).astype(np.float32)
    loop /= np.sqrt(np.mean(loop**2))
    if rng.random() < 0.2:
        t = np.arange(length, dtype=np.float32) / SAMPLE_RATE_HZ
        mains_hz = rng.choice((50.0, 60.0))
        for harmonic in range(1, 6):
            loop += rng.uniform(0.0, 1.0) * np.sin(2.0 * np.pi * mains_hz * harmonic * t)
    noise = _loop(loop, n, rng)
    return noise * _wander(n, rng) if rng.random() < 0.5 else noise


def _loop(samples: Samples, n: int, rng: np.random.Generator) -> Samples:
    """``n`` samples of a repeated sound, from anywhere in it."""
    start = int(rng.integers(len(samples)))
    return np.resize(np.roll(samples, -start), n)


def _level(samples: Samples, speech_rms: float, snr_db: float) -> Samples:
    rms = float(np.sqrt(np.mean(np.square(samples)))) + 1e-9
    return samples * np.float32(speech_rms / rms * 10.0 ** (-snr_db / 20.0))


def _wander(n: int, rng: np.random.Generator) -> Samples:
    """A gain that drifts, with a new aim every second. Returns (n,)."""
    aims = rng.uniform(-WANDER_DB, WANDER_DB, n // SAMPLE_RATE_HZ + 2)
    hop = 64  # samples of one gain
    grid = np.interp(np.arange(0, n + hop, hop) / SAMPLE_RATE_HZ, np.arange(len(aims)), aims)
    return np.repeat(10.0 ** (grid / 20.0), hop)[:n].astype(np.float32)


def _telephone(samples: Samples) -> Samples:
    """8 kHz and mu-law, there and back."""
    narrow = soxr.resample(samples, SAMPLE_RATE_HZ, CODEC_RATE_HZ, "LQ")
    narrow = np.clip(narrow, -1.0, 1.0)
    companded = np.sign(narrow) * np.log1p(MU * np.abs(narrow)) / np.log1p(MU)
    levels = np.round(companded * 127.0) / 127.0
    expanded = np.sign(levels) * np.expm1(np.abs(levels) * np.log1p(MU)) / MU
    wide = soxr.resample(expanded.astype(np.float32), CODEC_RATE_HZ, SAMPLE_RATE_HZ, "LQ")
    return np.resize(wide, len(samples)) if len(wide) != len(samples) else wide
