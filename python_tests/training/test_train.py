"""The trainee is transformers' model; the loop learns, resumes and stops when told."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from importlib.resources import as_file, files
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from toy_bank import toy_bank, write_toy_bank
from transformers import InklingForConditionalGeneration
from transformers.models.inkling import modeling_inkling

from duplex_engine import _core
from duplex_engine.errors import InvalidArgument
from duplex_engine.training import batches, episodes, train
from duplex_engine.training.command import run_command
from duplex_engine.training.decoder import decode
from duplex_engine.training.export import average, export
from duplex_engine.training.model import SIZES, Batch, Trainee, _Smooth, collate, losses
from duplex_engine.training.rows import layout
from duplex_engine.training.shards import save_shard
from duplex_engine.training.train import CHECKPOINT, LOG, Settings, load_trainee, run

BANK = toy_bank()


def batch(n: int = 2, n_turns: int = 40) -> Batch:
    """A few mixed episodes."""
    composed = (
        episodes.compose("mix", BANK, np.random.default_rng(seed), n_turns=n_turns)
        for seed in range(n)
    )
    return collate([layout(episodes.to_stream(episode)) for episode in composed])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one shard of twelve short episodes."""
    folder = tmp_path_factory.mktemp("shards")
    composed = [
        episodes.compose("mix", BANK, np.random.default_rng(seed), n_turns=30) for seed in range(12)
    ]
    save_shard(folder / "shard.npz", [episodes.to_stream(episode) for episode in composed])
    return folder


def settings(out: Path, shards: Path | None, **changes: object) -> Settings:
    """A run of a few steps in this process."""
    values = {"size": "toy", "batch": 2, "steps": 4, "hours": 1.0, "turns": 30}
    values |= {"compiled": False, "autocast": False} | changes
    return Settings(out=out, shards=shards, **values)  # type: ignore[arg-type]


def test_the_saved_model_computes_in_transformers_what_the_trainee_does(tmp_path: Path) -> None:
    """So the windows, the bias and the sums of the faster pass are transformers' own."""
    torch.manual_seed(0)
    trainee = Trainee(SIZES["toy"]).eval()
    for name, parameter in trainee.named_parameters():
        if "rel_logits_proj" in name:  # far from zero, and nowhere alike
            torch.nn.init.normal_(parameter)
    export(trainee, tmp_path, torch.float32)
    model = InklingForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    rows = batch(1)
    with torch.no_grad():
        embedded = trainee.embed(rows)
        expected = model(inputs_embeds=embedded, use_cache=False).logits
        found = trainee.inkling.lm_head(trainee(rows)[0])[..., : expected.shape[-1]]
    assert embedded.shape[1] > 2 * SIZES["toy"].window, "longer than two windows"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_weights_are_averaged_with_earlier_ones() -> None:
    last, earlier = Trainee(SIZES["toy"]), Trainee(SIZES["toy"])
    expected = [
        0.25 * before + 0.75 * weight.detach()
        for weight, before in zip(last.parameters(), earlier.parameters(), strict=True)
    ]
    for weight, right in zip(average(last, earlier, 0.25).parameters(), expected, strict=True):
        torch.testing.assert_close(weight, right)
    with pytest.raises(ValueError, match=r"share: expected 0 to 1, found 1\.5"):
        average(last, earlier, 1.5)
    with pytest.raises(ValueError, match="earlier: expected weights of shape"):
        average(last, Trainee(SIZES["tiny"]), 0.5)


def test_the_sound_table_starts_where_it_is_put() -> None:
    smooth = _Smooth(80, 16)
    table = torch.randn(80 * 16, 5)
    torch.testing.assert_close(smooth(smooth.right_inverse(table)), table, rtol=1e-3, atol=1e-4)
    spread = smooth(torch.eye(80 * 16)[:, [40 * 16 + 8]]).view(80, 16)
    assert spread.argmax() == 40 * 16 + 8
    assert spread[40, 9] == spread[40, 7] > spread[40, 10] > 0.1 * spread[40, 8]


def test_heads_begin_with_what_is_near() -> None:
    torch.manual_seed(0)
    trainee = Trainee(SIZES["small"])
    with as_file(files("duplex_engine") / "examples" / "speech.flac") as path:
        bins = torch.from_numpy(_core.dmel_bins(soundfile.read(path, dtype="float32")[0]))
    table = trainee._sound_table().weight.view(80, 16, -1)
    tower = trainee.inkling.model.audio_tower
    rows = tower.norm(table[torch.arange(80), bins.long()].sum(1))
    nearer = []
    for layer in trainee.inkling.model.language_model.layers:
        attention = layer.self_attn
        states = attention.r_proj(rows).view(len(rows), attention.num_heads, -1)
        bias = (states @ attention.rel_logits_proj.proj).mean(0)  # (heads, window)
        nearer.append(bias[:, 0] - bias[:, -1])
    difference = torch.cat(nearer)
    assert difference.mean() > 1.0
    assert (difference > 1.0).float().mean() > 0.7  # what else they begin with is random


def test_a_transformers_that_computes_another_model_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def without_norm(n: int, d: int, padding: int, _eps: float) -> torch.nn.Embedding:
        return torch.nn.Embedding(n, d, padding)

    monkeypatch.setattr(modeling_inkling, "InklingNormedEmbedding", without_norm)
    with pytest.raises(ImportError, match=r"5\.23 or newer"):
        Trainee(SIZES["toy"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
def test_compiled_parts_compute_the_same() -> None:
    torch.manual_seed(0)
    trainee = Trainee(SIZES["toy"])
    layers = trainee.inkling.model.language_model.layers
    inputs = torch.randn(1, 100, SIZES["toy"].d_model)
    results = []
    for compiled in (False, True):
        trainee.zero_grad()
        after = decode(layers, inputs, compiled=compiled)[-1]
        after.square().sum().backward()
        results.append([after.detach(), *(p.grad for p in layers.parameters())])
    for plain, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-4)


def test_padding_changes_nothing() -> None:
    trainee = Trainee(SIZES["toy"]).eval()
    composed = episodes.compose("mix", BANK, np.random.default_rng(0), n_turns=20)
    rows = layout(episodes.to_stream(composed))
    with torch.no_grad():
        exact = losses(trainee, collate([rows]))
        padded = losses(trainee, collate([rows], n_rows=len(rows.kinds) + 50))
    assert exact["token"].item() == pytest.approx(padded["token"].item(), rel=1e-5)
    assert exact["word"].item() == pytest.approx(padded["word"].item(), rel=1e-5)


def test_a_batch_can_be_learnt_by_heart() -> None:
    torch.manual_seed(0)
    trainee = Trainee(SIZES["toy"])
    rows = batch(2, 25)
    optimiser = torch.optim.AdamW(trainee.parameters(), lr=5e-3)
    values = []
    for _ in range(60):
        parts = losses(trainee, rows)
        values.append(parts["token"].item())
        optimiser.zero_grad()
        (parts["token"] + parts["word"]).backward()
        optimiser.step()
    assert values[-1] < 0.2 * values[0]


def test_a_run_logs_saves_and_resumes(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "LOG_EVERY", 2)
    first = run(settings(tmp_path, shards))
    log = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [line["step"] for line in log] == [2, 4]
    assert all(np.isfinite(line["token"]) for line in log)
    saved = load_trainee(tmp_path / CHECKPOINT)
    for name, value in first.state_dict().items():
        torch.testing.assert_close(value, saved.state_dict()[name])
    elapsed_s = torch.load(tmp_path / CHECKPOINT, weights_only=True)["elapsed_s"]
    run(settings(tmp_path, shards, steps=6))
    log = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [line["step"] for line in log] == [2, 4, 6]
    assert torch.load(tmp_path / CHECKPOINT, weights_only=True)["elapsed_s"] > elapsed_s > 0


def test_a_second_run_begins_with_the_weights_of_the_first(tmp_path: Path, shards: Path) -> None:
    first = run(settings(tmp_path / "one", shards))
    after = tmp_path / "one" / CHECKPOINT
    begun = train._Run(
        settings(tmp_path / "two", shards, after=after),
        Trainee(SIZES["toy"]),
        [],
    )
    begun.optimisers = train._optimisers(begun.trainee, 1e-3)
    begun.resume()
    for name, value in first.state_dict().items():
        torch.testing.assert_close(value, begun.trainee.state_dict()[name])
    assert (begun.step, begun.elapsed_s, begun.ramp) == (0, 0.0, 1.0)
    second = run(settings(tmp_path / "two", shards, after=after))
    assert any((a != b).any() for a, b in zip(first.parameters(), second.parameters(), strict=True))
    content = torch.load(tmp_path / "two" / CHECKPOINT, weights_only=True)
    assert content["step"] == 4


def test_a_part_may_begin_with_exported_weights(tmp_path: Path, shards: Path) -> None:
    torch.manual_seed(1)
    trainee = Trainee(SIZES["toy"])
    weights = {name: weight.clone() for name, weight in trainee.inkling.state_dict().items()}
    table = trainee._sound_table().weight.detach().clone()
    folder = export(trainee, tmp_path / "exported", torch.float32)
    begun = Trainee(SIZES["toy"])
    head = begun.word_head.weight.clone()
    begun.adopt(folder)
    torch.testing.assert_close(begun._sound_table().weight, table)
    for name, weight in begun.inkling.state_dict().items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-4, atol=1e-4)
    assert torch.equal(begun.word_head.weight, head)
    second = run(settings(tmp_path / "two", shards, after=folder, rate=0.0))
    torch.testing.assert_close(second._sound_table().weight, table)
    with pytest.raises(ValueError, match=r"expected a model of .* found \[32, 2, 48"):
        Trainee(SIZES["tiny"]).adopt(folder)
    with pytest.raises(FileNotFoundError, match=r"found no config\.json"):
        begun.adopt(tmp_path)
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"monday"', '"Monday"'))
    with pytest.raises(InvalidArgument, match="expected the 304 tokens"):
        begun.adopt(folder)


@pytest.mark.parametrize("p_drill", [-0.1, 1.1, 0.5, float("nan")])
def test_drills_need_a_bank(tmp_path: Path, shards: Path, p_drill: float) -> None:
    with pytest.raises(ValueError, match="p_drill: expected 0 to 1, and a bank"):
        settings(tmp_path, shards, p_drill=p_drill).check()


def test_the_same_seed_trains_the_same_model(tmp_path: Path, shards: Path) -> None:
    """But for rounding: the last bit of a product may depend on where its operands lie."""
    one, two = (run(settings(tmp_path / name, shards)).state_dict() for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [2, 6])  # fewer and more than the held-out episodes
def test_a_run_from_a_bank_is_judged_on_held_out_voices_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int
) -> None:
    pytest.importorskip("matplotlib", reason="the extra `train` is not installed")
    from duplex_engine.training.curves import plot_curves

    monkeypatch.setattr(train, "LOG_EVERY", 2)
    monkeypatch.setattr(train, "VALIDATE_EVERY", 2)
    monkeypatch.setattr(train, "N_VALIDATION", 4)
    monkeypatch.setattr(train, "N_DRILLS", 2)
    monkeypatch.setattr(batches, "N_WAITING", 2)
    bank = write_toy_bank(tmp_path / "bank", {"one": "train", "two": "train", "three": "held"})
    run(settings(tmp_path, None, bank=bank, steps=6, batch=batch_size))
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    held = [line for line in lines if "held_token" in line]
    assert [line["step"] for line in held] == [2, 4, 6]
    assert all(0 <= line[name] <= 1 for line in held for name in ("held_silent", "drill_heard"))
    plot_curves([tmp_path, tmp_path], tmp_path / "figures" / "curves.png")
    assert (tmp_path / "figures" / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize("replays", [0, 1, 3])
def test_what_is_composed_is_learnt_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replays: int
) -> None:
    monkeypatch.setattr(batches, "N_WAITING", 3)
    bank = write_toy_bank(tmp_path, {"one": "train"})
    chosen = settings(tmp_path, None, bank=bank, turns=10, replays=replays)
    streams = batches.streams(chosen, np.random.default_rng(0))
    drawn = [next(streams).bins.tobytes() for _ in range(10 * (1 + replays))]
    assert max(drawn.count(bins) for bins in drawn) == 1 + replays
    assert len(set(drawn)) <= 10 + 3, "those that wait"


def test_every_worker_composes_other_streams(tmp_path: Path) -> None:
    bank = write_toy_bank(tmp_path / "bank", {"one": "train"})
    chosen = settings(tmp_path / "run", None, bank=bank, turns=10, workers=2, steps=4)
    first, second = islice(batches.batches(chosen, rank=0, first_step=0), 2)
    assert first.bins.shape == second.bins.shape == (2 * 40, 80)
    assert (first.bins != second.bins).any()
    again = next(iter(batches.batches(chosen, rank=0, first_step=0)))
    assert (again.bins == first.bins).all(), "seeded"
    run(chosen)
    assert torch.load(tmp_path / "run" / CHECKPOINT, weights_only=True)["step"] == 4


@pytest.mark.parametrize("name", ["replays", "workers", "seed"])
def test_counts_are_not_negative(tmp_path: Path, shards: Path, name: str) -> None:
    with pytest.raises(InvalidArgument, match=f"{name}: expected 0 or more, found -1"):
        settings(tmp_path, shards, **{name: -1}).check()


@pytest.mark.parametrize("name", ["batch", "turns", "hours", "steps"])
def test_what_is_divided_by_is_not_zero(tmp_path: Path, shards: Path, name: str) -> None:
    with pytest.raises(InvalidArgument, match=f"{name}: expected more than 0, found 0"):
        run(settings(tmp_path, shards, **{name: 0}))


def test_with_a_budget_of_steps_alone_the_rate_does_not_depend_on_the_clock(
    tmp_path: Path, shards: Path
) -> None:
    chosen = settings(tmp_path, shards, steps=10, hours=None)
    assert train._Run(chosen, Trainee(SIZES["toy"]), [], step=2, elapsed_s=1e6).spent == 0.2
    both = settings(tmp_path, shards, steps=10, hours=1.0)
    assert train._Run(both, Trainee(SIZES["toy"]), [], step=2, elapsed_s=1800).spent == 0.5
    with pytest.raises(InvalidArgument, match="budget: expected hours or steps, found neither"):
        settings(tmp_path, shards, steps=None, hours=None).check()


def test_weights_that_are_not_finite_do_not_take_the_place_of_others(
    tmp_path: Path, shards: Path
) -> None:
    run(settings(tmp_path, shards, steps=1))
    before = (tmp_path / CHECKPOINT).read_bytes()
    trainee = Trainee(SIZES["toy"])
    torch.nn.init.constant_(trainee.word_head.weight, float("nan"))
    with pytest.raises(RuntimeError, match=r"step 7: expected finite .* in word_head\.weight"):
        train._Run(settings(tmp_path, shards), trainee, [], step=7).save()
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_a_log_that_was_written_again_is_drawn_once(tmp_path: Path) -> None:
    curves = pytest.importorskip("duplex_engine.training.curves", reason="no extra `train`")
    lines = [{"step": step, "elapsed_s": at_s} for step, at_s in ((20, 1), (40, 2), (60, 3))]
    again = [{"step": 40, "elapsed_s": 2.1}, {"step": 60, "elapsed_s": 3.1}]  # killed after 60
    (tmp_path / LOG).write_text("".join(json.dumps(line) + "\n" for line in lines + again))
    assert [line["step"] for line in curves._read_log(tmp_path / LOG)] == [20, 40, 40, 60]


def test_a_checkpoint_of_other_tokens_is_refused(tmp_path: Path, shards: Path) -> None:
    path = tmp_path / "run" / CHECKPOINT
    run(settings(tmp_path / "run", shards, steps=1))
    content = torch.load(path, weights_only=True)
    content["tokens"] = ("hello", *content["tokens"])
    torch.save(content, path)
    for begin in (load_trainee, lambda _: run(settings(tmp_path / "run", shards))):
        with pytest.raises(InvalidArgument, match=r"expected the 304 tokens of vocabulary\.py"):
            begin(path)
    del content["tokens"]  # as those from before this was written
    torch.save(content, path)
    load_trainee(path)


def test_a_command_ends_on_a_mistake_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        ([tmp_path], "data: expected one of bank and shards, found both or none"),
        ([tmp_path, "--bank", tmp_path], f"bank: expected clips in {tmp_path / 'clips.jsonl'}"),
        ([tmp_path, "--shards", tmp_path, "--after", tmp_path / "no"], "after: expected a"),
    ):
        monkeypatch.setattr("sys.argv", ["train", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            run_command(train.main)
        assert end.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {message}")
        assert error.count("\n") == 1


@pytest.mark.slow
def test_two_processes_learn_one_model(tmp_path: Path, shards: Path) -> None:
    trained = run(settings(tmp_path, shards, processes=2, steps=3))
    saved = load_trainee(tmp_path / CHECKPOINT)
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(value, saved.state_dict()[name])
    alone = run(settings(tmp_path / "alone", shards, steps=3))
    assert any(
        (a != b).any() for a, b in zip(trained.parameters(), alone.parameters(), strict=True)
    )
    assert torch.load(tmp_path / CHECKPOINT, weights_only=True)["step"] == 3


def test_gradients_are_averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process's part is played here: it adds twice this one's gradient."""
    trainee = Trainee(SIZES["toy"])
    chosen = settings(tmp_path, tmp_path, processes=3, batch=3)
    work = train._Run(chosen, trainee, [], elapsed_s=7.0)
    for parameter in trainee.parameters():
        parameter.grad = torch.ones_like(parameter)
    trainee.word_head.weight.grad = None  # nothing of it in this process's share

    def all_reduce(tensor: torch.Tensor) -> None:
        if tensor.dtype != torch.float64:  # the clock comes from this process alone
            tensor += 2.0 * tensor

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    work.start_clock()
    work._agree()
    assert work.elapsed_s == pytest.approx(7.0, abs=1.0)
    assert not work.stopping
    work.asked_to_stop = True
    work._agree()
    assert work.stopping
    for name, parameter in trainee.named_parameters():
        # Twice averaged: (1 + 2 * 1) / 3.
        expected = 0.0 if name == "word_head.weight" else 1.0
        assert parameter.grad is not None
        assert (parameter.grad == expected).all(), name


def test_a_signal_ends_a_run_with_a_checkpoint(tmp_path: Path, shards: Path) -> None:
    def interrupt() -> None:
        while not list(tmp_path.glob(LOG)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    killer = threading.Thread(target=interrupt)
    killer.start()
    run(settings(tmp_path, shards, steps=100_000))
    killer.join()
    assert signal.getsignal(signal.SIGTERM) is before
    step = torch.load(tmp_path / CHECKPOINT, weights_only=True)["step"]
    assert train.LOG_EVERY <= step < 100_000


def test_wrong_settings_are_refused(tmp_path: Path, shards: Path) -> None:
    with pytest.raises(ValueError, match="expected one of bank and shards"):
        run(Settings(out=tmp_path))
    with pytest.raises(FileNotFoundError, match=r"expected \*\.npz"):
        run(settings(tmp_path, tmp_path))
    with pytest.raises(ValueError, match="expected a multiple of the 2 processes, found 3"):
        run(settings(tmp_path, shards, batch=3, processes=2))
    with pytest.raises(ValueError, match="size: expected one of toy, tiny, small, base"):
        run(settings(tmp_path, shards, size="huge"))
    run(settings(tmp_path / "run", shards, steps=1))
    with pytest.raises(ValueError, match="expected a model of size tiny, found toy"):
        run(settings(tmp_path / "run", shards, size="tiny"))
