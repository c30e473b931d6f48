"""The servers that can be measured: how each is started, and how it is asked."""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from benchmarks import machine
from benchmarks.load import files
from benchmarks.load.prompts import Prompt
from benchmarks.load.vocabulary import text_of
from llama_jax.card import schemas as card
from llama_jax.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Launch:
    """One server to start."""

    program: str
    """One of PROGRAMS."""
    dtype: str
    config: ModelConfig
    checkpoint: str | None
    """Folder of weights for ours; None: random ones. Peers' are always random."""
    files: pathlib.Path
    """Folder of what the servers read."""
    slots: int
    context: int
    """Tokens of prompt plus output that a slot holds."""
    binary: str | None = None
    """Of llama-server."""

    def __str__(self) -> str:
        return f"{self.program}:{self.dtype}"

    @property
    def weights(self) -> pathlib.Path:
        """The file or folder of a peer's weights."""
        return self.files / f"{PROGRAMS[self.program].name}-{self.dtype}"

    @property
    def batches(self) -> bool:
        """Whether it draws for several requests at once."""
        return PROGRAMS[self.program].batches

    def settings(self) -> dict[str, Any]:
        """Return the arguments of `serve_ours.make_llama`."""
        return {
            "config": dataclasses.asdict(self.config),
            "dtype": self.dtype,
            "checkpoint": self.checkpoint,
            "tokenizer": str(self.files / "tokenizer.model"),
            "slots": self.slots,
            "context": self.context,
        }


@dataclasses.dataclass(frozen=True)
class Program:
    """A kind of server."""

    command: Callable[[Launch, int], list[str]]
    """Starts it on a port."""
    body: Callable[[Launch, Prompt], dict[str, Any]]
    """Returns what is asked of /v1/completions for a prompt, beyond what all are asked."""
    write: Callable[[pathlib.Path, ModelConfig, str], None] | None = None
    """Writes its weights."""
    name: str = ""
    """Of those: two that read the same share them."""
    modules: tuple[str, ...] = ()
    """What this interpreter must have for it."""
    batches: bool = True
    """Whether it draws for several requests at once."""
    reads: str = "token ids"
    """What its prompts are given as."""

    def request(self, launch: Launch, prompt: Prompt) -> dict[str, Any]:
        """Return the whole body of a request."""
        common = {"max_tokens": prompt.new_tokens, "temperature": 0, "stream": True}
        return common | self.body(launch, prompt)


def _ours(launch: Launch, port: int) -> list[str]:
    settings = json.dumps(launch.settings() | {"port": port})
    return [sys.executable, "-m", "benchmarks.engines.serve_ours", "serve", settings]


def _llamacpp(launch: Launch, port: int) -> list[str]:
    cores = str(machine.cores())
    return [
        *(sys.executable, "-m", "llama_cpp.server", "--model", str(launch.weights)),
        *("--port", str(port), "--n_ctx", str(launch.context)),
        *("--n_threads", cores, "--n_threads_batch", cores),
        # By default a new request ends the one that is running, and logits of all tokens are kept.
        *("--interrupt_requests", "false", "--logits_all", "false", "--verbose", "false"),
    ]


def _llama_server(launch: Launch, port: int) -> list[str]:
    assert launch.binary is not None
    cores = str(machine.cores())
    return [
        *(launch.binary, "--model", str(launch.weights), "--port", str(port)),
        *("--parallel", str(launch.slots), "--ctx-size", str(launch.context * launch.slots)),
        *("--threads", cores, "--threads-batch", cores, "--cont-batching", "--no-webui"),
    ]


def _transformers(launch: Launch, port: int) -> list[str]:
    return [
        *(sys.executable, "-m", "transformers.cli.transformers", "serve", str(launch.weights)),
        *("--port", str(port), "--device", "cpu", "--dtype", launch.dtype),
        *("--host", "127.0.0.1", "--continuous-batching"),
    ]


PROGRAMS = {
    "ours": Program(
        _ours,
        lambda launch, prompt: {
            "model": card.MODEL,
            "prompt": prompt.tokens,
            "ignore_eos": True,
            "stream_options": {"include_usage": True},
        },
    ),
    "llamacpp": Program(
        _llamacpp,
        lambda launch, prompt: {"prompt": text_of(prompt.tokens)},
        write=files.write_gguf,
        name="gguf",
        modules=("llama_cpp", "gguf", "sse_starlette", "starlette_context"),
        batches=False,
        reads="text of as many tokens",
    ),
    "llama-server": Program(
        _llama_server,
        lambda launch, prompt: {"prompt": prompt.tokens, "ignore_eos": True},
        write=files.write_gguf,
        name="gguf",
        modules=("llama_cpp", "gguf"),
    ),
    "hf": Program(
        _transformers,
        lambda launch, prompt: {
            "model": str(launch.weights),
            "prompt": text_of(prompt.tokens),
        },
        write=files.write_huggingface,
        name="hf",
        modules=("torch", "transformers", "fastapi", "uvicorn", "openai"),
        reads="text of as many tokens",
    ),
}
"""By name: ours, llama-cpp-python's server, llama.cpp's own, transformers'."""
