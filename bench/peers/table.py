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
    kv: str = "bf16"  # format of keys and values; a peer takes what it has of that size


EVERY_SHAPE = ("S", "M", "MOE")
OURS = Entry("duplex", "duplex", shapes=EVERY_SHAPE)
OURS_KV8 = Entry("duplex-kv8", "duplex", shapes=EVERY_SHAPE, kv="int8")
FLOOR = Entry("floor", "floor", shapes=EVERY_SHAPE)
FLOOR_KV8 = Entry("floor-kv8", "floor", shapes=EVERY_SHAPE, kv="int8")
PEERS = (
    Entry("llama.cpp", "llama_cpp", own_environment=False),
    Entry("llama.cpp-kv8", "llama_cpp", own_environment=False, kv="int8"),
    Entry("torch", "torch_qwen3", ("bf16",), "eager"),
    Entry("torch-compile", "torch_qwen3", ("bf16",), "compile"),
    Entry("transformers", "hf_transformers", ("bf16",), shapes=EVERY_SHAPE),
    Entry("onnxruntime", "ort_genai", ("int4",), own_environment=False),
)
ENTRIES = {entry.name: entry for entry in (OURS, OURS_KV8, FLOOR, FLOOR_KV8, *PEERS)}


def of_same_kv(engine: str, other: Entry, other_kv8: Entry) -> Entry:
    """Which of two to compare an engine with: the one whose keys and values have its format."""
    return other_kv8 if ENTRIES[engine].kv == "int8" else other
