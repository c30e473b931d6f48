"""Requests whose answers are known: the same request alone, on a quiet server, was given them."""

import dataclasses
import http.client
import json
import random
import urllib.parse
from typing import Any

from llama_jax.card.schemas import MODEL
from tools.soak.server import TOKEN

NATIVE = f"/client/v4/accounts/soak/ai/run/{MODEL}"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
CONTEXT, VOCABULARY = 512, 1000
"""Of the demo model, which has some more tokens."""
QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."
DRAWN = 20
"""Requests with a temperature and a seed."""
TYPICAL = {"prompt": QUESTION, "max_tokens": 64, "ignore_eos": True, "temperature": 0}
"""The polite client's request."""


class WrongAnswerError(Exception):
    """An answer that the server must not give."""


@dataclasses.dataclass(frozen=True)
class Known:
    """A request to the native or the completions route, and its only right answer.

    Args:
        path: the route.
        body: what is sent.
        status: of the answer.
        text: the generated text; "" of an error.
    """

    path: str
    body: dict[str, Any]
    status: int = 200
    text: str = ""

    def check(self, status: int, content: bytes) -> None:
        """Raise WrongAnswerError unless this is the answer."""
        if (status, text := _text(self.path, status, content)) != (self.status, self.text):
            short = json.dumps(self.body)[:60]
            raise WrongAnswerError(
                f"{status} {text!r:.80} for {short}, expected {self.status} {self.text!r:.80}"
            )


def ask_all(url: str, step: int) -> list[Known]:
    """Return requests with their answers, the typical one first; nobody else may ask meanwhile.

    Args:
        url: the server's.
        step: between two lengths of prompts; 1: every one that the context holds.
    """
    rng = random.Random(0)
    model = {"model": MODEL}
    requests = [
        Known(COMPLETIONS, model | TYPICAL),
        Known(NATIVE, {"prompt": QUESTION, "temperature": 0}, text=ANSWER),
    ]
    for length in range(1, CONTEXT, step):
        prompt = [1, *(rng.randrange(3, VOCABULARY) for _ in range(length - 1))]
        limits = {"max_tokens": min(8, CONTEXT - length), "temperature": 0}
        requests.append(Known(COMPLETIONS, {**model, **limits, "prompt": prompt}))
    for seed in range(1, DRAWN + 1):
        drawn = {"prompt": "The king", "max_tokens": 5 * seed, "temperature": 1, "seed": seed}
        requests.append(Known(COMPLETIONS, model | drawn))
    for length in (CONTEXT, CONTEXT + 1, 10 * CONTEXT):
        requests.append(Known(COMPLETIONS, {**model, "prompt": [5] * length}, status=400))
    return [_ask(url, request) for request in requests]


def _ask(url: str, known: Known) -> Known:
    """Return a request with the answer that it gets; check what is known of it before."""
    address = urllib.parse.urlsplit(url)
    assert address.hostname
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
    headers = {"authorization": f"Bearer {TOKEN}"}
    connection.request("POST", known.path, json.dumps(known.body), headers)
    with connection.getresponse() as response:
        content = response.read()
    connection.close()
    text = _text(known.path, response.status, content)
    if not known.text:
        known = dataclasses.replace(known, text=text)
    known.check(response.status, content)
    return known


def _text(path: str, status: int, content: bytes) -> str:
    """Return the text of a whole answer; "" of an error."""
    if status != http.client.OK:
        return ""
    answer = json.loads(content)
    return answer["result"]["response"] if path == NATIVE else answer["choices"][0]["text"]
