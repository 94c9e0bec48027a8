"""Checkpoints of codes and scales: the same bytes of logits as from the values in float32."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import codes
import numpy as np
import pytest
import torch
from codes import FORMS, Form, Tensors, is_matrix, quantise
from devices import CUDA
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity import OracleCheckpoint, logits, mixed_prompt
from safetensors.torch import load_file, save_file

from duplex_engine import CheckpointError, Engine, InvalidArgument, _core
from duplex_engine.checkpoint import Checkpoint

NAMES = ["uneven_heads", "moe_mixed"]
ENGINES: list[dict[str, Any]] = [
    {"dtype": "float32"},
    {"dtype": "bfloat16"},
    {"dtype": "float32", "weights": "int4"},
]


def write(folder: Path, to: Path, tensors: Tensors, config: dict[str, Any] | None = None) -> Path:
    """The checkpoint `folder` with other tensors, and other keys of config.json."""
    to.mkdir(parents=True, exist_ok=True)
    values = json.loads((folder / "config.json").read_text()) | (config or {})
    (to / "config.json").write_text(json.dumps(values))
    save_file(tensors, to / "new")
    (to / "new").replace(to / "model.safetensors")
    return to


def is_routed(name: str, tensor: torch.Tensor) -> bool:
    """As published: the routed experts of all layers but the first that has some."""
    return is_matrix(name, tensor) and ".mlp.experts." in name and ".layers.1." not in name


def test_the_tables_are_torch_s() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(every.view(torch.float8_e4m3fn).float().numpy(), codes.E4M3)
    exponents = every.view(torch.float8_e8m0fnu).float().numpy()[:255]
    np.testing.assert_array_equal(exponents, np.ldexp(np.float32(1), np.arange(255) - 127))
    np.testing.assert_array_equal(codes.minifloat(2, 1, 1), codes.E2M1)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: e.get("weights", e["dtype"]))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("original", [True, False], ids=["published", "modules"])
@pytest.mark.parametrize("name", NAMES)
def test_codes_are_their_values(
    name: str,
    original: bool,
    form: str,
    engine: dict[str, Any],
    oracle_checkpoint: OracleCheckpoint,
    tmp_path: Path,
) -> None:
    folder, model = oracle_checkpoint(name)
    if not original:
        folder = tmp_path / "modules"
        model.save_pretrained(folder, save_original_format=False)
    tensors = load_file(folder / "model.safetensors")
    coded, plain = quantise(tensors, FORMS[form])
    assert sum(tensor.element_size() == 1 for tensor in coded.values()) > 30
    prompt = mixed_prompt(model, seed=1)
    expected = logits(write(folder, tmp_path / "plain", plain), prompt, **engine)
    found = logits(write(folder, tmp_path / "coded", coded), prompt, **engine)
    assert found.tobytes() == expected.tobytes()
    assert found.tobytes() != logits(folder, prompt, **engine).tobytes()


def test_the_published_mixture_and_its_config(
    oracle_checkpoint: OracleCheckpoint, tmp_path: Path
) -> None:
    """Experts in NVFP4, all else in bfloat16, several files, ModelOpt's note in config.json."""
    folder, model = oracle_checkpoint("moe_mixed", dtype="bfloat16")
    tensors = load_file(folder / "model.safetensors")
    coded, plain = quantise(tensors, FORMS["published"], is_routed)
    assert coded["model.llm.layers.2.mlp.experts.w13_weight"].dtype == torch.uint8
    assert coded["model.llm.layers.1.mlp.experts.w13_weight"].dtype == torch.bfloat16
    assert coded["model.llm.layers.2.mlp.experts.w2_weight.scale2"].shape == (16,)
    note = {"quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["x"]}}
    to = write(folder, tmp_path / "coded", coded, {"quantization_config": note})
    (to / "hf_quant_config.json").write_text(json.dumps(note))
    half = len(coded) // 2
    parts = {"a.safetensors": list(coded)[:half], "b.safetensors": list(coded)[half:]}
    for file, names in parts.items():
        save_file({name: coded[name] for name in names}, to / file)
    (to / "model.safetensors").unlink()
    weight_map = {name: file for file, names in parts.items() for name in names}
    (to / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    prompt = mixed_prompt(model, seed=1)
    write(folder, tmp_path / "plain", plain)
    for dtype in ("float32", "bfloat16", "auto"):
        expected = logits(tmp_path / "plain", prompt, dtype=dtype)
        assert logits(to, prompt, dtype=dtype).tobytes() == expected.tobytes()


@pytest.mark.parametrize("form", ["mxfp8", "mxfp4"])
def test_bfloat16_holds_codes_times_powers_of_two(
    form: str, oracle_checkpoint: OracleCheckpoint
) -> None:
    tensors = load_file(oracle_checkpoint("uneven_heads")[0] / "model.safetensors")
    _, plain = quantise(tensors, FORMS[form])
    for name, tensor in plain.items():
        if is_matrix(name, tensor):
            assert torch.equal(tensor.bfloat16().float(), tensor)


@pytest.mark.skipif(CUDA not in _core.backend_names(), reason="a build without tests")
def test_mxfp8_on_a_gpu_is_the_same_in_fewer_bytes(
    oracle_checkpoint: OracleCheckpoint, tmp_path: Path
) -> None:
    """Codes in memory have the bits of bfloat16 weights; on the host where no CUDA is named."""
    folder = oracle_checkpoint("moe_mixed")[0]
    coded, _ = quantise(load_file(folder / "model.safetensors"), FORMS["mxfp8"])
    to = write(folder, tmp_path / "coded", coded)
    found = []
    for weights in ("auto", "mxfp8"):
        options: dict[str, Any] = {"dtype": "bfloat16", "weights": weights}
        with (
            Engine.load(to, device=CUDA, **options) as engine,
            engine.open_session() as session,
        ):
            found.append(session.append(text=[3, 1, 4, 1, 5], logits="all").tobytes())
    assert found[0] == found[1]
    for device, dtype in (("cpu", "bfloat16"), (CUDA, "float32")):
        with pytest.raises(InvalidArgument, match="weights: "):
            Engine.load(to, device=device, weights="mxfp8", dtype=dtype)


@pytest.mark.skipif(CUDA not in _core.backend_names(), reason="a build without tests")
@pytest.mark.parametrize("pick", [is_matrix, is_routed], ids=["all", "routed"])
@pytest.mark.parametrize("form", ["published", "compressed-tensors"])
@pytest.mark.parametrize("name", NAMES)
def test_nvfp4_on_a_gpu_keeps_its_bytes(
    name: str,
    form: str,
    pick: Callable[[str, torch.Tensor], bool],
    oracle_checkpoint: OracleCheckpoint,
    tmp_path: Path,
) -> None:
    """Less memory, and the bits of bfloat16 weights of the same values."""
    folder = oracle_checkpoint(name)[0]
    coded, plain = quantise(load_file(folder / "model.safetensors"), FORMS[form], pick)
    bits, n_bytes = [], []
    for tensors, weights in ((plain, "bfloat16"), (coded, "nvfp4")):
        to = write(folder, tmp_path / weights, tensors)
        with (
            Engine.load(to, device=CUDA, dtype="bfloat16") as engine,
            engine.open_session() as session,
        ):
            assert engine.weights == weights
            n_bytes.append(dict(engine.memory_plan)["weights"])
            bits.append(session.append(text=[3, 1, 4, 1, 5, 9, 2, 6, 5], logits="all").tobytes())
    assert bits[0] == bits[1]
    assert n_bytes[1] < n_bytes[0]


def test_nvfp4_is_asked_for_where_it_is(
    oracle_checkpoint: OracleCheckpoint, tmp_path: Path
) -> None:
    folder = oracle_checkpoint("moe_mixed")[0]
    with pytest.raises(InvalidArgument, match="expected a checkpoint with NVFP4 weights"):
        Engine.load(folder, weights="nvfp4", dtype="bfloat16")
    coded, _ = quantise(load_file(folder / "model.safetensors"), FORMS["published"])
    to = write(folder, tmp_path / "coded", coded)
    with pytest.raises(InvalidArgument, match=r"device 'cpu' takes .* found nvfp4"):
        Engine.load(to, device="cpu", weights="nvfp4", dtype="bfloat16")
    with pytest.raises(InvalidArgument, match="nvfp4 with the dtype bfloat16, found nvfp4"):
        Engine.load(to, weights="nvfp4", dtype="float32")
    with Engine.load(to, device="cpu", dtype="bfloat16") as engine:
        assert engine.weights == "bfloat16"


@pytest.mark.parametrize("form", ["published", "compressed-tensors"])
def test_bfloat16_rounds_nvfp4_once(form: str, oracle_checkpoint: OracleCheckpoint) -> None:
    """The second scale has 24 bits: the bound that docs/CHECKPOINT.md states."""
    tensors = load_file(oracle_checkpoint("uneven_heads")[0] / "model.safetensors")
    _, plain = quantise(tensors, FORMS[form])
    worst = 0.0
    for name, tensor in plain.items():
        if is_matrix(name, tensor):
            value = tensor[tensor != 0].double()
            worst = max(worst, ((value.bfloat16().double() - value) / value).abs().max().item())
    assert 0 < worst <= 2**-8


def test_exponents_of_their_own_type(oracle_checkpoint: OracleCheckpoint, tmp_path: Path) -> None:
    folder, model = oracle_checkpoint("uneven_heads")
    tensors = load_file(folder / "model.safetensors")
    coded, plain = quantise(tensors, FORMS["mxfp8"])
    coded = {
        name: tensor.view(torch.float8_e8m0fnu) if name.endswith("_scale") and
        tensor.dtype == torch.uint8 else tensor
        for name, tensor in coded.items()
    }  # fmt: skip
    with Checkpoint.open(write(folder, tmp_path / "coded", coded)) as opened:
        assert "F8_E8M0" in {entry.dtype for entry in opened.tensors}
    prompt = mixed_prompt(model, seed=1)
    expected = logits(write(folder, tmp_path / "plain", plain), prompt)
    assert logits(tmp_path / "coded", prompt).tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_half_precision(dtype: str, oracle_checkpoint: OracleCheckpoint, tmp_path: Path) -> None:
    folder, model = oracle_checkpoint("uneven_heads")
    tensors = load_file(folder / "model.safetensors")
    halves = {name: tensor.half() for name, tensor in tensors.items()}
    plain = {name: tensor.float() for name, tensor in halves.items()}
    prompt = mixed_prompt(model, seed=1)
    expected = logits(write(folder, tmp_path / "plain", plain), prompt, dtype=dtype)
    found = logits(write(folder, tmp_path / "half", halves), prompt, dtype=dtype)
    assert found.tobytes() == expected.tobytes()


def test_blocks_of_128_across_larger_matrices(
    oracle_checkpoint: OracleCheckpoint, tmp_path: Path
) -> None:
    folder, model = oracle_checkpoint("bigger")
    tensors = load_file(folder / "model.safetensors")
    coded, plain = quantise(tensors, FORMS["fp8-block"])
    assert max(t.shape[-1] for n, t in coded.items() if n.endswith("_inv")) > 1
    prompt = mixed_prompt(model, seed=1)
    expected = logits(write(folder, tmp_path / "plain", plain), prompt)
    assert logits(write(folder, tmp_path / "coded", coded), prompt).tobytes() == expected.tobytes()


# --- codes that cannot be read ------------------------------------------------------------------

Damage = Callable[[Tensors, dict[str, str]], None]


def drop(role: str) -> Damage:
    return lambda tensors, names: tensors.__delitem__(names[role])


def replaced(role: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    def damage(tensors: Tensors, names: dict[str, str]) -> None:
        tensors[names[role]] = change(tensors[names[role]]).contiguous()

    return damage


def with_byte(value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The last element's byte is another."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        raw = tensor.clone().view(torch.uint8)
        raw.view(-1)[-1] = value
        return raw.view(tensor.dtype)

    return change


def filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: torch.full_like(tensor, value)


CASES: dict[str, tuple[str, str, Damage, str]] = {
    # form, the role that is named, what is done, what is said
    "no scale": ("modelopt", "codes", drop("block"), "E2M1 codes: expected their scales as one of"),
    "no scale of fp8": ("mxfp8", "codes", drop("block"), "F8_E4M3 codes: expected their scales"),
    "no second scale": ("modelopt", "codes", drop("second"), "expected their second scale as one"),
    "a row less": ("modelopt", "block", replaced("block", lambda t: t[:-1]), "expected shape ("),
    "blocks of 32": (
        "modelopt", "block", replaced("block", lambda t: t[:, ::2]), "for each 16 columns"),
    "blocks of 16": (
        "mxfp8", "block", replaced("block", lambda t: t.repeat(1, 2)), "for each 32 columns"),
    "float scales": ("modelopt", "block", replaced("block", lambda t: t.float()),
                     "expected scales of F8_E4M3 or F8_E8M0 for the E2M1 codes"),
    "scales of another type": ("fp8-row", "block", replaced("block", lambda t: t.long()),
                               "expected scales of F8_E8M0, F32, BF16 or F16"),
    "scales of no known grid": ("fp8-row", "block", replaced("block", lambda t: t[:-1]),
                                "(one a row) or"),
    "two second scales": (
        "modelopt", "second", replaced("second", lambda t: t.repeat(2)), "expected 1 float"),
    "NaN block scale": (
        "modelopt", "block", replaced("block", with_byte(0x7F)), "holds a NaN or infinity for"),
    "NaN exponent": ("mxfp8", "block", replaced("block", with_byte(0xFF)), "holds a NaN or inf"),
    "NaN code": ("mxfp8", "codes", replaced("codes", with_byte(0xFF)), "holds a NaN or infinity"),
    "NaN second scale": (
        "published", "second", replaced("second", filled(np.nan)), "holds a NaN or infinity for"),
    "division by zero": ("compressed-tensors", "second", replaced("second", filled(0)),
                         "holds a NaN or infinity for"),
    "codes too narrow": (
        "modelopt", "block", replaced("codes", lambda t: t[:, :-8]), "expected shape ("),
    "integers": ("modelopt", "codes", replaced("codes", lambda t: t.long()),
                 "expected elements of F32, BF16, F16, F8_E4M3 or packed U8, found I64"),
}  # fmt: skip


def damaged(
    case: str, original: bool, oracle_checkpoint: OracleCheckpoint, tmp_path: Path
) -> tuple[Path, str]:
    """The checkpoint of a case, and the name of the tensor that is at fault."""
    form_name, role, damage, _ = CASES[case]
    folder, model = oracle_checkpoint("uneven_heads")
    if not original:
        folder = tmp_path / "modules"
        model.save_pretrained(folder, save_original_format=False)
    layer = "model.llm.layers.1.attn.wq_du" if original else (
        "model.language_model.layers.1.self_attn.q_proj")  # fmt: skip
    form: Form = FORMS[form_name]
    coded, _ = quantise(load_file(folder / "model.safetensors"), form)
    names = {
        role: spelling.format(name=f"{layer}.weight", module=layer)
        for role, spelling in (
            ("codes", form.codes),
            ("block", form.block),
            ("second", form.second),
        )
    }
    damage(coded, names)
    return write(folder, tmp_path / "bad", coded), names[role]


@pytest.mark.parametrize("original", [True, False], ids=["published", "modules"])
@pytest.mark.parametrize("case", CASES)
def test_bad_codes_name_their_tensor(
    case: str, original: bool, oracle_checkpoint: OracleCheckpoint, tmp_path: Path
) -> None:
    folder, name = damaged(case, original, oracle_checkpoint, tmp_path)
    with pytest.raises(CheckpointError, match=re.escape(f"'{name}'")) as caught:
        logits(folder, [])
    assert CASES[case][-1] in str(caught.value)


@pytest.mark.skipif(CUDA not in _core.backend_names(), reason="a build without tests")
@pytest.mark.parametrize("case", ["NaN block scale", "NaN second scale", "division by zero"])
def test_scales_that_are_no_numbers_on_a_gpu(
    case: str, oracle_checkpoint: OracleCheckpoint, tmp_path: Path
) -> None:
    folder, name = damaged(case, True, oracle_checkpoint, tmp_path)
    with pytest.raises(CheckpointError, match=re.escape(f"'{name}' {CASES[case][-1]}")):
        Engine.load(folder, device=CUDA, dtype="bfloat16")


def test_a_scale_of_plain_values_is_left_over(
    oracle_checkpoint: OracleCheckpoint, tmp_path: Path
) -> None:
    folder, _ = oracle_checkpoint("uneven_heads")
    tensors = load_file(folder / "model.safetensors")
    name = "model.llm.layers.1.attn.wq_du.weight_scale"
    with pytest.raises(CheckpointError, match=f"not part of the model: '{name}'"):
        logits(write(folder, tmp_path / "bad", tensors | {name: torch.ones(1)}), [])


def test_a_file_cut_short(oracle_checkpoint: OracleCheckpoint, tmp_path: Path) -> None:
    folder, _ = oracle_checkpoint("uneven_heads")
    coded, _ = quantise(load_file(folder / "model.safetensors"), FORMS["published"])
    path = write(folder, tmp_path / "bad", coded) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: expected"):
        logits(path.parent, [])


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method: expected one of modelopt, "),
        (
            {"quantization": {"quant_algo": "W4A16_AWQ", "group_size": 128}},
            "group_size: expected 16",
        ),
        ("nvfp4", "quantization_config: expected an object, found 'nvfp4'"),
        ({"config_groups": 5}, "quantization_config.config_groups: expected an object, found 5"),
        ({"weight_block_size": "x"}, "weight_block_size: expected a list, found 'x'"),
    ],
)
@pytest.mark.parametrize("place", ["", "text_config."])
def test_quantisations_that_are_not_understood(
    quantization: object, message: str, place: str, oracle_checkpoint: OracleCheckpoint,
    tmp_path: Path,
) -> None:  # fmt: skip
    folder, _ = oracle_checkpoint("uneven_heads")
    shutil.copy(folder / "model.safetensors", tmp_path)
    values = json.loads((folder / "config.json").read_text())
    (values["text_config"] if place else values)["quantization_config"] = quantization
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        logits(tmp_path, [])
    assert f"{place}quantization_config" in str(caught.value)


DTYPES = [torch.uint8, torch.int64, torch.float32, torch.bfloat16, torch.float8_e4m3fn]


@pytest.mark.fuzz
@settings(
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_random_companions_never_crash(
    oracle_checkpoint: OracleCheckpoint, tmp_path: Path, data: st.DataObject
) -> None:
    folder, _ = oracle_checkpoint("uneven_heads")
    form = FORMS[data.draw(st.sampled_from(sorted(FORMS)))]
    coded, _ = quantise(
        load_file(folder / "model.safetensors"), form, lambda name, _: "wq_du" in name
    )
    names = sorted(name for name in coded if "wq_du" in name)
    shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 4, 16, 64, 192]), max_size=3))
    raw = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    dtype = data.draw(st.sampled_from(DTYPES))
    is_viewed = dtype.itemsize == 1 and data.draw(st.booleans())
    coded[data.draw(st.sampled_from(names))] = raw.view(dtype) if is_viewed else raw.to(dtype)
    with suppress(CheckpointError):
        logits(write(folder, tmp_path, coded), [("text", np.array([1, 2]))])
