"""Record what Cloudflare's validator says: `python -m tools.record_cabidela NPM_FOLDER`.

NPM_FOLDER is where `npm install @cloudflare/cabidela@0.2.4` was run; Node.js must be at hand. The
payloads are drawn from a fixed seed, and the record, tests/data/cabidela.json, is what
tests/test_contract.py holds llama_jax/contract.py against.
"""

import json
import pathlib
import random
import subprocess
from typing import Any

from absl import app

from llama_jax.card.schemas import INPUT_SCHEMA

RECORD = pathlib.Path(__file__).resolve().parent.parent / "tests" / "data" / "cabidela.json"
PACKAGE = "@cloudflare/cabidela"
COUNT = 240

SCRIPT = f"""
import {{ readFileSync }} from "node:fs";
const later = {{  // methods of newer versions of Node.js
  union(other) {{ return new Set([...this, ...other]); }},
  difference(other) {{ return new Set([...this].filter((item) => !other.has(item))); }},
}};
for (const [name, method] of Object.entries(later)) Set.prototype[name] ??= method;
const {{ Cabidela }} = await import("{PACKAGE}");
const {{ schema, payloads }} = JSON.parse(readFileSync(0, "utf8"));
const validator = new Cabidela(schema, {{ fullErrors: true, applyDefaults: true }});
const judge = (payload) => {{
  try {{ validator.validate(payload); return null; }} catch (error) {{ return error.message; }}
}};
console.log(JSON.stringify(payloads.map(judge)));
"""

GOOD = {
    "raw": [True, False],
    "stream": [True, False],
    "max_tokens": [16, 16.0, 1e2, 0, -1, 10**12],
    "temperature": [0, 0.6, 5, -0.0],
    "top_p": [0, 0.9, 2],
    "top_k": [1, 50, 40.0],
    "seed": [1, 9_999_999_999],
    "repetition_penalty": [0, 1.1, 2],
    "frequency_penalty": [0, 2.0],
    "presence_penalty": [0.5],
    "stop": [None, ["a"]],
    "lora": ["a"],
}
ODD = [
    *(None, True, False, -1, 0, 0.5, 5.1, 50.5, 51, 10_000_000_000, 1e300, "", "1"),
    *([], ["a", 1], [None, True], [True], [{"a": 1}], [["a"]], {}, {"a": 1}),
]
MESSAGE = {"role": "user", "content": "hi"}


def draw_payload(rng: random.Random) -> Any:
    """Draw a payload that is nearly right: a branch or both, some fields, a fault or two."""
    if rng.random() < 0.02:
        return rng.choice(ODD)
    payload: dict[str, Any] = {}
    if rng.random() < 0.55:
        payload["prompt"] = rng.choice([*["hi"] * 4, "", rng.choice(ODD)])
    if rng.random() < 0.55:
        messages = [_draw_message(rng) for _ in range(rng.choice([0, 1, 1, 2, 3]))]
        payload["messages"] = rng.choice([*[messages] * 6, rng.choice(ODD)])
    for name in rng.sample(list(GOOD), rng.choice([0, 0, 1, 1, 2, 3])):
        payload[name] = rng.choice(GOOD[name] if rng.random() < 0.5 else ODD)
    names = rng.sample(list(payload), len(payload))
    return {name: payload[name] for name in names}


def _draw_message(rng: random.Random) -> Any:
    if rng.random() < 0.7:
        return MESSAGE
    if rng.random() < 0.2:
        return rng.choice(ODD)
    changed = MESSAGE | {rng.choice(["role", "content", "name"]): rng.choice(ODD)}
    kept = rng.sample(list(changed), rng.choice([1, 2, len(changed)]))
    return {name: changed[name] for name in kept}


def draw_payloads() -> list[Any]:
    """Draw payloads that all differ, the same ones at each call."""
    rng = random.Random(0)
    payloads: dict[str, Any] = {}
    while len(payloads) < COUNT:
        payload = draw_payload(rng)
        payloads[json.dumps(payload, sort_keys=True)] = payload
    return list(payloads.values())


def judge(folder: pathlib.Path, payloads: list[Any]) -> list[str | None]:
    """Return the validator's message for each payload, or None where it accepts it."""
    request = {"schema": json.loads(INPUT_SCHEMA), "payloads": payloads}
    command = ["node", "--input-type=module", "--eval", SCRIPT]
    done = subprocess.run(
        command,
        cwd=folder,
        input=json.dumps(request),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def main(argv: list[str]) -> None:
    """Draw, judge and write."""
    if len(argv) != 2:
        raise app.UsageError("expected one argument, the folder of an npm install")
    folder = pathlib.Path(argv[1])
    package = json.loads((folder / "node_modules" / PACKAGE / "package.json").read_text("utf-8"))
    about = f"recorded verdicts of {PACKAGE} {package['version']} for the card's input schema"
    payloads = draw_payloads()
    cases = [
        json.dumps({"payload": payload, "text": text})
        for payload, text in zip(payloads, judge(folder, payloads), strict=True)
    ]
    lines = ",\n    ".join(cases)
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(f'{{\n  "about": "{about}",\n  "cases": [\n    {lines}\n  ]\n}}\n', "utf-8")


if __name__ == "__main__":
    app.run(main)
