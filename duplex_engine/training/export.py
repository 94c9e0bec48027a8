"""From a training checkpoint to an interaction checkpoint that the engine loads.

Owns the `interaction` block and the files around the weights, which `transformers` writes in the
layout of the published models. The word head stays behind: it served training only.

    python -m duplex_engine.training.export out/run/checkpoint.pt out/reference

With ``--earlier`` the weights are averaged with those of a part of training before: two ends of one
way are often better between than either is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from duplex_engine.errors import InvalidArgument
from duplex_engine.training.command import run_command
from duplex_engine.training.model import Trainee
from duplex_engine.training.stage import FRAMES_PER_TURN, MAX_TOKENS, TURN_S
from duplex_engine.training.train import load_trainee
from duplex_engine.training.vocabulary import CONTROL_TOKENS, TOKENS, token_id, write_tokenizer

__all__ = ["INTERACTION", "average", "export"]

INTERACTION = {
    "micro_turn_ms": round(1000 * TURN_S),
    "audio_frames": FRAMES_PER_TURN,
    "max_output_tokens": MAX_TOKENS + 1,  # and `listen`
    "max_image_patches": 1,
} | {token.strip("<|>"): token_id(token) for token in CONTROL_TOKENS if token != "<|pad|>"}

CARD = """# The reference interaction model

An Inkling of {millions:.1f} million parameters that listens in micro-turns of 200 ms and speaks up
by itself: it corrects a mistake in a list or a sentence that it knows, answers when a question is
finished, stops when it is interrupted, repeats the words of a class as they are heard, delegates
what it cannot answer, and says what it sees in a picture of 40 x 39 pixels. It hears sound and
writes words; nothing else decides when. Load it with `Engine.load("reference")`.

Made from random weights by `duplex_engine.training`; `docs/TRAINING.md` of the project has the
recipe and every detail. Licence of the weights: Apache-2.0.

## Data
Streams composed from synthetic speech: espeak-ng (152 voices), flite (3), SVOX Pico (4 pitches of
one voice) and Kokoro-82M (16 voices) say {words} English words and fixed phrases of them, sentences
that ask for nothing, and speech in thirteen other languages, with music on hold, noises, rooms,
microphones and telephones added. No recording of a person was trained on.

## Licences
espeak-ng is GPL-3 (the program; its output is free), flite and its voices BSD-like, Pico and Kokoro
Apache-2.0, the music on hold CC-BY-SA-3.0. The weights hold no recording.

## Figures
{figures}

## Limits
It knows {words} words and the tasks above, in English, and nothing else: it is no assistant. What
it says is chosen from the same words. Voices unlike synthetic ones, children and strong accents
were not trained on, rooms and other talkers only simulated. A word that it does not know is at
times taken for one that it does. Only about seven seconds are looked at directly.
"""
NO_FIGURES = "Not measured yet: `duplex-engine eval FOLDER --bank BANK` does."


def export(trainee: Trainee, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Writes config.json, model.safetensors, tokenizer.json and README.md; returns the folder.

    The trainee itself is settled and rounded to `dtype`.
    """
    out = Path(folder)
    trainee.settle()
    trainee.inkling.to(dtype)  # type: ignore[arg-type]
    model = trainee.inkling
    model.save_pretrained(out)
    (out / "generation_config.json").unlink(missing_ok=True)  # the engine's stream has none
    config_file = out / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["interaction"] = INTERACTION
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(out / "tokenizer.json")
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    card = CARD.format(
        millions=n_parameters / 1e6,
        words=len(TOKENS) - len(CONTROL_TOKENS),
        figures=NO_FIGURES,
    )
    (out / "README.md").write_text(card, encoding="utf-8")
    return out


@torch.no_grad()
def average(trainee: Trainee, earlier: Trainee, share: float) -> Trainee:
    """The trainee with `share` of each weight from an earlier one of its size, the rest its own.

    Raises:
        InvalidArgument: another size, or a share that is not from 0 to 1.
    """
    if not 0.0 <= share <= 1.0:
        raise InvalidArgument(f"share: expected 0 to 1, found {share}")
    for weight, before in zip(trainee.parameters(), earlier.parameters(), strict=True):
        if weight.shape != before.shape:
            raise InvalidArgument(
                f"earlier: expected weights of shape {tuple(weight.shape)} as in the checkpoint, "
                f"found {tuple(before.shape)}: another size of model"
            )
        weight.lerp_(before, share)
    return trainee


def main(
    checkpoint: Annotated[Path, typer.Argument(help="checkpoint.pt of a training run.")],
    out: Annotated[Path, typer.Argument(help="Folder of the interaction checkpoint.")],
    earlier: Annotated[
        Path | None, typer.Option(help="checkpoint.pt of an earlier part, to average with.")
    ] = None,
    share: Annotated[float, typer.Option(help="What of the average is the earlier part's.")] = 0.5,
) -> None:
    """Makes a checkpoint that `Engine.load` takes, in bfloat16."""
    trainee = load_trainee(checkpoint)
    export(trainee if earlier is None else average(trainee, load_trainee(earlier), share), out)


if __name__ == "__main__":
    run_command(main)
