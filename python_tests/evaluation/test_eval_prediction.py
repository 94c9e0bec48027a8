"""The cost model states the engine's own bytes, and what it predicts hangs together."""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from typer.testing import CliRunner

from duplex_engine import Engine
from duplex_engine.cli import app
from duplex_engine.config import ModelConfig
from duplex_engine.errors import BackendUnavailable
from duplex_engine.evaluation.machines import MACHINES, Fit
from duplex_engine.evaluation.prediction import DEADLINE_MS, Setup, Variant, predict, sessions
from duplex_engine.evaluation.prediction_tables import cases
from duplex_engine.evaluation.work import (
    INKLING_SMALL,
    RECIPES,
    TURNS,
    Pass,
    arena_bytes,
    pass_work,
    session_bytes,
    touched_experts,
    weight_bytes,
)
from duplex_engine.models.random import PRESETS, preset_config, write_random_checkpoint

ROOT = Path(__file__).parents[2]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
FORMATS = [("float32", "auto"), ("bfloat16", "auto"), ("bfloat16", "int8"), ("float32", "int4")]


def total(config: ModelConfig, recipe: str, p: Pass, field: str, tp: int = 1) -> float:
    return sum(op.n * getattr(op, field) for op in pass_work(config, RECIPES[recipe], p, tp=tp))


@pytest.mark.cpu
@pytest.mark.parametrize("preset", PRESETS)
def test_the_arena_is_the_engines(preset: str, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, preset)
    for dtype, weights in FORMATS:
        with Engine.load(tmp_path, dtype=dtype, weights=weights, memory="64MiB") as engine:
            recipe = RECIPES[dtype if weights == "auto" else weights]
            stated = arena_bytes(engine.config, recipe, 4 if dtype == "float32" else 2)
            assert stated == dict(engine.memory_plan)["weights"]


def test_the_operations_are_the_engines() -> None:
    source = (ROOT / "csrc" / "model" / "inkling.cpp").read_text(encoding="utf-8")
    bodies = re.split(r"^\S.*Inkling::(\w+)\(", source, flags=re.MULTILINE)[1:]
    ops = {
        name: [
            found or "linear"  # sum_parts is one
            for found in re.findall(
                r"backend_\.(norm|linear|kv_append|attention|moe|conv\w+)\(|\bsum_parts\(",
                body,
            )
        ]
        for name, body in zip(bodies[::2], bodies[1::2], strict=True)
    }
    experts, *dense = ops["mlp_half"]
    last = ops["add_and_norm"]
    # "moe" has a dense layer of local attention, then experts with local and with global.
    expected = list(ops["run_block"])
    for mlp in (dense, [experts], [experts]):
        expected += [*ops["attention_half"], *last, *mlp, *last]
    expected += ops["multiply_head"]

    def called(name: str) -> str:
        if name in ("router", "experts_up", "experts_down", "combine"):
            return "moe"
        return "linear" if name in ("qkvr", "out", "gate_up", "down", "head") else name

    config = ModelConfig.from_dict(preset_config(PRESETS["moe"]))
    names = [op.name for op in pass_work(config, RECIPES["bfloat16"], Pass())]
    stated = [called(name) for name in names if not name.startswith("embed")]
    assert [name for name, _ in groupby(stated) if name != "linear"] == [
        name for name, _ in groupby(expected) if name != "linear"
    ]
    assert stated.count("linear") == expected.count("linear")


def test_a_pass_is_that_of_the_floor_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    for shape in importlib.import_module("bench.shapes").SHAPES.values():
        config = ModelConfig.from_dict(preset_config(shape.preset))
        text = config.text
        # What the floor program leaves out: the bank of biases, and half of the router's float32.
        banks = sum(
            4 * text.d_rel * (text.sliding_window_size if is_local else text.rel_extent)
            for is_local in text.is_local
        )
        n_experts = text.n_routed_experts + text.n_shared_experts
        routers = sum(text.is_moe) * 2 * n_experts * text.hidden_size
        for rows in (1, 4000):  # one row chooses its experts, so many choose them all
            ops = shape.ops(rows, 2048, np.random.default_rng(0))
            p = Pass(text=rows, context=2048)
            stated = total(config, "bfloat16", p, "weight_bytes")
            stated += total(config, "bfloat16", p, "cache_bytes")
            assert stated - banks - routers == pytest.approx(shape.bytes_read(ops, "bf16"))


def test_the_published_model_has_its_published_size() -> None:
    text = INKLING_SMALL.text
    # The file also has 8 dense layers that guess tokens ahead.
    d, d_ff = text.hidden_size, text.intermediate_size
    heads = text.num_attention_heads * (text.head_dim + text.d_rel)
    attention = d * (heads + 2 * text.num_key_value_heads * text.head_dim + d)
    guessing = 8 * 2 * (2 * d * d + attention + 3 * d * d_ff)
    held = weight_bytes(INKLING_SMALL, RECIPES["bfloat16"]) + guessing
    assert held == pytest.approx(531.9e9, rel=1e-3)
    per_position = session_bytes(INKLING_SMALL, 2000) - session_bytes(INKLING_SMALL, 1000)
    assert per_position == 1000 * 28 * 1024


def test_published_nvfp4_has_shared_experts_in_bfloat16() -> None:
    text, p = INKLING_SMALL.text, Pass(audio=4)
    expert = 3 * text.hidden_size * text.moe_intermediate_size
    ops = {op.name: op for op in pass_work(INKLING_SMALL, RECIPES["nvfp4"], p) if op.n == 33}
    shared = ops["shared_up"].weight_bytes + ops["shared_down"].weight_bytes
    assert shared == text.n_shared_experts * expert * 2
    routed = ops["experts_up"].weight_bytes + ops["experts_down"].weight_bytes
    assert routed == pytest.approx(touched_experts(text, 5) * expert * 4.5 / 8)
    whole = weight_bytes(INKLING_SMALL, RECIPES["nvfp4"])
    one_format = RECIPES["nvfp4"]._replace(shared=RECIPES["nvfp4"].experts)
    n_moe = sum(text.is_moe)
    assert whole - weight_bytes(INKLING_SMALL, one_format) == pytest.approx(
        n_moe * text.n_shared_experts * expert * (2 - 4.5 / 8)
    )


def test_patches_go_through_the_tower() -> None:
    seeing = Pass(audio=4, patches=12)
    encoders = [
        op for op in pass_work(INKLING_SMALL, RECIPES["nvfp4"], seeing) if op.kind == "encoders"
    ]
    stages = [(128, 75), (320, 512), (4800, 5120), (4096, 9600)]
    assert sum(op.weight_bytes for op in encoders) == 2 * sum(a * b for a, b in stages)
    # Of 2 frames of 40 x 40 pixels: 8 x 8, 4 x 4 and one cell, then both frames in one.
    cells = [2 * 64, 2 * 16, 2, 1]
    products = sum(n * a * b for n, (a, b) in zip(cells, stages, strict=True))
    assert sum(op.operations for op in encoders) == 12 * 2 * products


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_ranks_share_the_work(tp: int) -> None:
    p = Pass(audio=4, context=32_768)
    for field in ("weight_bytes", "cache_bytes", "operations"):
        whole = total(INKLING_SMALL, "nvfp4", p, field)
        one = total(INKLING_SMALL, "nvfp4", p, field, tp)
        assert whole / tp <= one < 1.5 * whole / tp  # the router and banks of biases are not split
    assert weight_bytes(INKLING_SMALL, RECIPES["nvfp4"], tp) * tp < 154.5e9 * 1.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_parts_add_up_and_more_is_longer(variant: Variant) -> None:
    setup = Setup(INKLING_SMALL, MACHINES["B200"], 4, "nvfp4", variant)
    times = [predict(setup, turn).ms for turn in TURNS.values()]
    assert times == sorted(times)
    one = predict(setup, TURNS["silent"])
    assert one.ms == pytest.approx(sum(one.parts_ms.values()))
    assert all(ms >= 0 for ms in one.parts_ms.values())
    for n, m in pairwise((1, 2, 8, 32, 256)):
        fewer, more = (predict(setup, TURNS["silent"], k).ms for k in (n, m))
        assert fewer < more
    longer = predict(setup, TURNS["silent"], 1, 262_144)
    assert longer.parts_ms["attention"] > one.parts_ms["attention"]
    heavier = predict(replace(setup, recipe="bfloat16"), TURNS["silent"])
    assert heavier.parts_ms["weights"] > one.parts_ms["weights"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_faster_memory_is_never_slower(variant: Variant) -> None:
    def at(times: float) -> float:
        base = MACHINES["H200"]

        def faster(fit: Fit) -> Fit:
            return fit._replace(bytes_per_s=times * fit.bytes_per_s)

        machine = replace(
            base,
            products={key: faster(fit) for key, fit in base.products.items()},
            experts={key: faster(fit) for key, fit in base.experts.items()},
            attention=faster(base.attention),
        )
        return predict(Setup(INKLING_SMALL, machine, 8, "fp8", variant), TURNS["5 tokens"]).ms

    assert at(1) > at(2) > at(4)


def test_variants_are_in_order() -> None:
    for machine in MACHINES.values():
        for tp in (1, 2, 4, 8):
            design, public, today = (
                predict(Setup(INKLING_SMALL, machine, tp, "nvfp4", variant), TURNS["silent"])
                for variant in ("design", "public", "today")
            )
            assert design.ms < min(public.ms, today.ms)  # the other two have different starts
            assert design.n_launches == 1
            assert design.n_kernels < today.n_kernels


def test_the_goals_hold_with_public_kernels_too() -> None:
    for case in cases(INKLING_SMALL, "nvfp4", ("design", "public"), ["B200"], [4]):
        for turns in case.turns.values():
            assert turns["silent"].ms < 10
            assert turns["5 tokens"].ms < 30


def test_one_session_more_would_be_late() -> None:
    setup = Setup(INKLING_SMALL, MACHINES["GB300"], 8, "nvfp4")
    turn = TURNS["5 tokens"]
    served = sessions(setup, turn, 32_768)
    assert predict(setup, turn, served.in_time, 32_768).ms <= DEADLINE_MS
    assert predict(setup, turn, served.in_time + 1, 32_768).ms > DEADLINE_MS
    assert served.n == min(served.in_time, served.in_memory)
    longer = sessions(setup, turn, 262_144)
    assert longer.in_memory < served.in_memory
    assert sessions(replace(setup, variant="today"), turn, 32_768).n < served.n


def test_no_machine_holds_what_does_not_fit() -> None:
    def ranks(machine: str) -> list[int]:
        found = cases(INKLING_SMALL, "bfloat16", machines=[machine], contexts=[1024])
        return [case.setup.tp for case in found]

    assert ranks("H100") == [8]
    assert ranks("GB300")[0] > 1


def test_an_all_reduce_takes_longer_the_more_it_reduces() -> None:
    for machine in MACHINES.values():
        for fit in machine.all_reduce.values():
            times = [fit.us(1 << n) for n in range(11, 24)]
            assert times == sorted(times)


def test_gpu_check_predicts_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable(*_: Any, **__: Any) -> None:
        raise BackendUnavailable("no driver")

    monkeypatch.setattr(Engine, "load", unavailable)
    result = CliRunner().invoke(app, ["gpu-check"])
    assert result.exit_code != 0
    assert "predicted, not measured" in result.output
    assert "B200" in result.output
