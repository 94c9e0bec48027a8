"""ONNX Runtime GenAI, int4 weights: a Qwen3 of random weights, exported by its model builder.

Cutting the cache back is `rewind_to`; appending n tokens is one call, which computes logits for the
last row alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og

from bench.peers.worker import Job, Peer, token_ids

SPARE_ROWS = 64
PREFILL_ROWS = 512


def save_qwen3(folder: Path, job: Job) -> None:
    """A Qwen3 as transformers saves it, with a tokenizer that nobody will use."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models

    from bench.peers.hf_transformers import qwen3

    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = qwen3(job, max_position_embeddings=32_768, **ids)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(3)}, unk_token="<0>"))
    fast: Any = transformers.PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, eos_token="<2>").save_pretrained(folder)


def export(folder: Path, job: Job) -> None:
    """Runs the builder that comes with the package."""
    source = folder.with_suffix(".hf")
    save_qwen3(source, job)
    builder = Path(og.__file__).parent / "models" / "builder.py"
    command = [sys.executable, str(builder), "-i", str(source), "-o", str(folder)]
    command += ["-p", "int4", "-e", "cpu", "-c", str(folder.with_suffix(".cache"))]
    result = subprocess.run(command, capture_output=True, text=True)
    print(result.stdout, result.stderr)
    if result.returncode:
        raise RuntimeError(f"the model builder failed: {result.stderr.strip().splitlines()[-1]}")


class OrtGenai(Peer):
    """One generator."""

    def __init__(self, job: Job, option: str) -> None:
        super().__init__(job, option)
        folder = Path(job.cache) / f"{job.shape}-ort-{job.bits}"
        config_file = folder / "genai_config.json"
        if not config_file.exists():
            export(folder, job)
        config = json.loads(config_file.read_text())
        session_options = config["model"]["decoder"]["session_options"]
        session_options["intra_op_num_threads"] = job.threads
        config_file.write_text(json.dumps(config))
        self.model = og.Model(str(folder))
        params = og.GeneratorParams(self.model)
        params.set_search_options(
            max_length=job.max_context + SPARE_ROWS, min_length=job.max_context + SPARE_ROWS
        )
        self.generator = og.Generator(self.model, params)
        self.length = 0
        self.description = f"ONNX Runtime GenAI {og.__version__}, int4"

    def reset(self, context: int) -> None:
        if self.length > context:
            self.generator.rewind_to(context)
            self.length = context
        while self.length < context:
            self.append(min(PREFILL_ROWS, context - self.length))

    def append(self, n: int) -> None:
        self._forward(token_ids(n, seed=self.length))

    def decode(self, n: int) -> None:
        for _ in range(n):
            self._forward([int(np.argmax(self.generator.get_logits()))])

    def _forward(self, ids: list[int]) -> None:
        self.generator.append_tokens(np.array([ids], dtype=np.int32))
        self.length += len(ids)


def load(job: Job, option: str) -> OrtGenai:
    """ONNX Runtime GenAI with a model of the job's sizes."""
    return OrtGenai(job, option)
