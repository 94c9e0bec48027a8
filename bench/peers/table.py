"""The engines that are compared. A new one is one file beside this and one entry here."""

from __future__ import annotations

from dataclasses import dataclass

ALL_BITS = ("bf16", "int8", "int4")


@dataclass(frozen=True, slots=True)
class Entry:
    """One engine. `module` is its file here; `option` is handed to it."""

    name: str
    module: str
    bits: tuple[str, ...] = ALL_BITS
    option: str = ""
    own_environment: bool = True  # else the peers' (see `make bench-peers`)
    shapes: tuple[str, ...] = ("S", "M")


OURS = Entry("duplex", "duplex", shapes=("S", "M", "MOE"))
FLOOR = Entry("floor", "floor", shapes=("S", "M", "MOE"))
PEERS = (
    Entry("llama.cpp", "llama_cpp", own_environment=False),
    Entry("torch", "torch_qwen3", ("bf16",), "eager"),
    Entry("torch-compile", "torch_qwen3", ("bf16",), "compile"),
    Entry("transformers", "hf_transformers", ("bf16",), shapes=("S", "M", "MOE")),
    Entry("onnxruntime", "ort_genai", ("int4",), own_environment=False),
)
ENTRIES = {entry.name: entry for entry in (OURS, FLOOR, *PEERS)}
