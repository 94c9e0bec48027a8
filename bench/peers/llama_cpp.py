"""llama.cpp by llama-cpp-python: a Qwen3 of random weights in a GGUF file written here.

The low-level interface is used, so that appending n tokens to a live cache is one call and only the
last row's logits are computed. Flash attention is off: on the CPU it was the faster setting for
chunks of rows; a cache in Q8_0 needs it. The head is tied to the embedding, which reads as many
bytes as our separate one.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import llama_cpp as c
import numpy as np
from numpy.typing import NDArray

from bench.peers.worker import Job, Peer, token_ids

TYPES = {
    "bf16": gguf.GGMLQuantizationType.BF16,
    "int8": gguf.GGMLQuantizationType.Q8_0,
    "int4": gguf.GGMLQuantizationType.Q4_0,
}
CACHE_TYPES = {"bf16": gguf.GGMLQuantizationType.BF16}  # the others keep float16, llama's default
BLOCK = 32  # weights that share a float16 scale in Q8_0 and Q4_0
SPARE_ROWS = 64
PREFILL_ROWS = 512


def random_matrix(rng: np.random.Generator, shape: tuple[int, int], bits: str) -> NDArray[np.uint8]:
    """The bytes of a random matrix (n_out, n_in) in the GGUF type."""
    n_out, n_in = shape
    if bits == "bf16":
        values: NDArray[np.float32] = rng.standard_normal(shape, dtype=np.float32) * (n_in**-0.5)
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    payload = BLOCK if bits == "int8" else BLOCK // 2
    blocks = rng.integers(0, 256, (n_out, n_in // BLOCK, 2 + payload), dtype=np.uint8)
    scale = n_in**-0.5 / (74 if bits == "int8" else 4.6)  # the deviation of such integers
    blocks[:, :, :2] = np.frombuffer(np.float16(scale).tobytes(), dtype=np.uint8)
    return blocks.reshape(n_out, -1)


def matrices(job: Job) -> dict[str, tuple[int, int]]:
    """Name in the file -> (n_out, n_in)."""
    d, d_q, d_kv = job.d_model, job.n_heads * job.d_head, job.n_kv_heads * job.d_head
    of_layer = {
        "attn_q": (d_q, d),
        "attn_k": (d_kv, d),
        "attn_v": (d_kv, d),
        "attn_output": (d, d_q),
        "ffn_gate": (job.d_ff, d),
        "ffn_up": (job.d_ff, d),
        "ffn_down": (d, job.d_ff),
    }
    found = {"token_embd.weight": (job.vocab_size, d)}
    for layer in range(job.n_layers):
        found |= {f"blk.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
    return found


def write_gguf(path: Path, job: Job) -> None:
    """A Qwen3 of the job's sizes without a vocabulary."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_block_count(job.n_layers)
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(job.d_model)
    writer.add_feed_forward_length(job.d_ff)
    writer.add_head_count(job.n_heads)
    writer.add_head_count_kv(job.n_kv_heads)
    writer.add_key_length(job.d_head)
    writer.add_value_length(job.d_head)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_vocab_size(job.vocab_size)
    writer.add_tokenizer_model("none")
    norms = {"output_norm.weight": job.d_model}
    for layer in range(job.n_layers):
        for name, width in (("attn", job.d_model), ("ffn", job.d_model)):
            norms[f"blk.{layer}.{name}_norm.weight"] = width
        for name in ("attn_q", "attn_k"):
            norms[f"blk.{layer}.{name}_norm.weight"] = job.d_head
    for name, width in norms.items():
        writer.add_tensor(name, np.ones(width, dtype=np.float32))
    for name, shape in matrices(job).items():
        writer.add_tensor(name, random_matrix(rng, shape, job.bits), raw_dtype=TYPES[job.bits])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp(Peer):
    """One context with one sequence."""

    def __init__(self, job: Job, option: str) -> None:
        super().__init__(job, option)
        path = Path(job.cache) / f"{job.shape}-{job.bits}.gguf"
        if not path.exists():
            part = path.with_suffix(".part")
            write_gguf(part, job)
            part.rename(path)
        c.llama_backend_init()
        self.model = c.llama_model_load_from_file(
            str(path).encode(), c.llama_model_default_params()
        )
        params = c.llama_context_default_params()
        params.n_ctx = job.max_context + SPARE_ROWS
        params.n_batch = params.n_ubatch = PREFILL_ROWS
        params.n_threads = params.n_threads_batch = job.threads
        kv_type = CACHE_TYPES.get(job.bits, gguf.GGMLQuantizationType.F16)
        if job.kv == "int8":
            kv_type = gguf.GGMLQuantizationType.Q8_0
        params.flash_attn_type = (
            c.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if job.kv == "int8"
            else c.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.type_k = params.type_v = kv_type.value
        self.context = c.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp could not make a context for {path.name}")
        self.memory = c.llama_get_memory(self.context)
        self.batch = c.llama_batch_init(PREFILL_ROWS, 0, 1)
        self.length = 0
        kind = TYPES[job.bits].name
        self.description = (
            f"llama-cpp-python {c.__version__}, {kind}, cache {kv_type.name}, "
            f"{'' if job.kv == 'int8' else 'no '}flash attention"
        )

    def reset(self, context: int) -> None:
        if self.length > context:
            c.llama_memory_seq_rm(self.memory, 0, context, -1)
            self.length = context
        while self.length < context:
            self.append(min(PREFILL_ROWS, context - self.length))

    def append(self, n: int) -> None:
        self._forward(token_ids(n, seed=self.length))

    def decode(self, n: int) -> None:
        for _ in range(n):
            logits = np.ctypeslib.as_array(
                c.llama_get_logits_ith(self.context, -1), (self.job.vocab_size,)
            )
            self._forward([int(logits.argmax())])

    def _forward(self, ids: list[int]) -> None:
        batch = self.batch
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i] = token
            batch.pos[i] = self.length + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = i + 1 == len(ids)
        status = c.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode: expected 0, found {status}")
        self.length += len(ids)


def load(job: Job, option: str) -> LlamaCpp:
    """llama.cpp with a model of the job's sizes."""
    return LlamaCpp(job, option)
