"""Write what mixed requests give, so that two commits can be compared token by token.

  python tools/golden.py --out=after.json                    # of this checkout
  PYTHONPATH=../before python tools/golden.py --out=before.json
  diff before.json after.json

In each dtype 16 requests in a batch and 4 of them as streams with a stop string and
log-probabilities; 16 over each of the two HTTP routes; with seeds, penalties and filters. Logits
are compared by the SHA-256 of their bytes. `--nokernels` computes as a machine without a C++
compiler does.
"""

import argparse
import hashlib
import importlib.util
import json
import pathlib
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from typing import Any

MODEL = "@cf/meta/llama-2-7b-chat-fp16"
PROMPTS = (
    "What is the capital of France?",
    "Tell me a story about a llama.",
    "Hello",
    "Why? " * 60,
)
VARIANTS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 2.0, "top_k": 40, "repetition_penalty": 1.3},
    {"temperature": 5.0, "frequency_penalty": 0.7, "presence_penalty": 0.4},
)


def requests() -> Iterator[dict[str, Any]]:
    """Yield the requests: each prompt with each variant and its own seed."""
    seed = 1
    for prompt in PROMPTS:
        for variant in VARIANTS:
            seed = seed * 6364136223846793005 % 9_999_999_999
            yield {"prompt": prompt, "max_tokens": 24 + seed % 24, "seed": seed, **variant}


def generated(path: str | None, dtype: str) -> dict[str, Any]:
    """Return what the Python interface gives in one dtype."""
    import numpy as np

    from llama_jax import Llama

    llm = Llama.load(path, dtype=dtype, context=512, slots=4)
    tokens: list[Any] = [r.tokens for r in llm.generate_all(requests())]
    for request, expected in list(zip(requests(), tokens, strict=True))[::5]:
        stream = llm.stream(**request, logprobs=3, stop=["zebra"])
        text = "".join(stream)
        assert stream.result.tokens == expected, "a stream differs from the batch"
        tokens.append([text, [entry.logprob for entry in stream.result.logprobs or []]])
    ids = list(range(3, 203))
    logits = np.ascontiguousarray(llm.logits(ids))
    return {"tokens": tokens, "logits": hashlib.sha256(logits.tobytes()).hexdigest()}


def served(root: pathlib.Path, path: str | None) -> list[Any]:
    """Return what the native route and OpenAI's give over HTTP."""
    command = [sys.executable, str(root / "run.py"), "serve", "--port=0", "--slots=4"]
    command += [f"--checkpoint={path}"] if path else []
    answers = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=root) as server:
        assert server.stderr is not None
        try:
            address = next(line for line in server.stderr if "http://" in line)
            base = address.split("http://")[1].split()[0]
            for request in requests():
                text = post(f"http://{base}/client/v4/accounts/a/ai/run/{MODEL}", request)
                messages = [{"role": "user", "content": request["prompt"]}]
                body = {"model": MODEL, "messages": messages} | request
                del body["prompt"]
                chat = post(f"http://{base}/v1/chat/completions", body)
                answers.append(text["result"]["response"])
                answers.append(chat["choices"][0]["message"]["content"])
        finally:
            server.terminate()
    return answers


def post(url: str, body: dict[str, Any]) -> Any:
    """Send JSON; return the JSON that comes back."""
    request = urllib.request.Request(url, json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def main() -> None:
    """Write everything to one file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--checkpoint", help="default: the embedded demo model")
    parser.add_argument("--nokernels", action="store_true", help="as without a C++ compiler")
    args = parser.parse_args()
    if args.nokernels:
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *rest: (  # type: ignore[assignment]
            None if "kernels_" in name else find(name, *rest)
        )
    import llama_jax

    found = {d: generated(args.checkpoint, d) for d in ("float32", "float16", "bfloat16")}
    root = pathlib.Path(llama_jax.__file__).parent.parent
    served_texts = [] if args.nokernels else served(root, args.checkpoint)
    args.out.write_text(json.dumps({"python": found, "http": served_texts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
