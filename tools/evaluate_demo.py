"""Measure what the demo model knows, and what it refuses: `python -m tools.evaluate_demo`.

Nothing here is of the training: the paraphrases and the unknown questions are held back. Prints a
line a measure with its threshold, and exits with 1 if one is missed.
"""

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Iterable, Sequence

from absl import logging

from llama_jax import Llama
from tools.demo_corpus import REFUSAL, Corpus, read_corpus, read_held_back
from tools.demo_rows import GREETINGS, RECALLS, greeting_answer, recall_answer

ROOT = pathlib.Path(__file__).resolve().parent.parent
DEMO = ROOT / "llama_jax" / "demo" / "checkpoint"
THRESHOLDS = {
    "suggested": 1.0,
    "names": 0.98,
    "case and punctuation": 0.98,
    "paraphrases": 0.9,
    "unknown": 0.9,
}
"""The least share that must be right, of each measure that has one."""

SEEDS = 40
"""Answers to each suggested question."""

ANY_TALE = "Tell me a story."
"""Any of the corpus's tales answers it, whole."""

Case = tuple[dict, frozenset[str]]
"""A request, and the answers that are right."""


def suggested_questions(corpus: Corpus) -> list[str]:
    """Return the questions of the corpus that the page, the README and the quickstart propose."""
    page = (ROOT / "llama_jax" / "server" / "page" / "index.html").read_text(encoding="utf-8")
    examples = re.search(r'<div id="examples">(.*?)</div>', page, re.DOTALL)
    assert examples, "the page has no examples"
    texts = re.findall(r">([^<>]+)</button>", examples[1])
    texts += re.findall(r'--prompt="([^"]+)"', (ROOT / "README.md").read_text(encoding="utf-8"))
    notebook = json.loads((ROOT / "notebooks" / "quickstart.ipynb").read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        quoted = re.findall(r'"([^"]+)"', "".join(cell["source"]))
        texts += [*quoted, *(f"What is the capital of {country}?" for country in quoted)]
    known = {text for phrasings, _ in corpus.questions for text in phrasings}
    return [text for text in dict.fromkeys(texts) if text in known and len(text.split()) > 1]


def suggested(corpus: Corpus) -> Iterable[Case]:
    """Yield the suggested questions under many seeds, at the default temperature."""
    answers = {
        text: frozenset([answer]) for phrasings, answer in corpus.questions for text in phrasings
    }
    begin = ANY_TALE.rstrip(".")
    tales = [answer for text, answer in answers.items() if text.startswith(begin)]
    answers[ANY_TALE] = frozenset().union(*tales)
    for text in suggested_questions(corpus):
        for seed in range(SEEDS):
            yield {"prompt": text, "seed": seed}, answers[text]


def names(corpus: Corpus) -> Iterable[Case]:
    """Yield each name, to be recalled after 0 to 3 other turns."""
    between = [(phrasings[0], answer) for phrasings, answer in corpus.questions]
    for i, name in enumerate(corpus.names):
        for turns in range(4):
            dialog = [(GREETINGS[i % len(GREETINGS)].format(name), greeting_answer(name))]
            dialog += [between[(17 * i + 101 * turn) % len(between)] for turn in range(turns)]
            messages = [
                {"role": role, "content": text}
                for turn in dialog
                for role, text in zip(("user", "assistant"), turn, strict=True)
            ]
            recall = RECALLS[(i + turns) % len(RECALLS)]
            messages.append({"role": "user", "content": recall})
            yield {"messages": messages, "temperature": 0}, frozenset([recall_answer(name)])


def measures(corpus: Corpus) -> dict[str, list[Case]]:
    """Return the cases of each measure."""
    paraphrases, unknown = read_held_back()
    first = [(phrasings[0], answer) for phrasings, answer in corpus.questions]

    def greedy(pairs: Iterable[tuple[str, str]]) -> list[Case]:
        return [({"prompt": text, "temperature": 0}, frozenset([answer])) for text, answer in pairs]

    return {
        "suggested": list(suggested(corpus)),
        "names": list(names(corpus)),
        "case and punctuation": greedy(
            (text.lower().rstrip("?.!"), answer) for text, answer in first
        ),
        "all in capital letters": greedy((text.upper(), answer) for text, answer in first),
        "paraphrases": greedy(paraphrases),
        "unknown": greedy((text, REFUSAL) for text in unknown),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and exit with 1 if a threshold is missed."""
    parser = argparse.ArgumentParser(prog="python -m tools.evaluate_demo", description=__doc__)
    parser.add_argument("--checkpoint", default=DEMO, help="Checkpoint to measure.")
    parser.add_argument("--failures", action="store_true", help="Print each wrong answer.")
    options = parser.parse_args(arguments)
    logging.set_verbosity(logging.WARNING)
    llm = Llama.load(options.checkpoint, slots=8, context=512)
    missed = []
    for name, cases in measures(read_corpus()).items():
        results = llm.generate_all(request for request, _ in cases)
        answers = [(result.response or "").strip() for result in results]
        wrong = [
            (request, right, said)
            for (request, right), said in zip(cases, answers, strict=True)
            if said not in right
        ]
        share = 1 - len(wrong) / len(cases)
        wanted = THRESHOLDS.get(name)
        bound = "" if wanted is None else f"  (at least {wanted:.0%})"
        print(f"{name:24} {len(cases) - len(wrong):4} of {len(cases):4}  {share:6.1%}{bound}")
        if wanted is not None and share < wanted:
            missed.append(name)
        if options.failures:
            for request, right, said in wrong:
                text = request.get("prompt") or request["messages"][-1]["content"]
                print(f"    {text!r}: {said!r}, not {' or '.join(map(repr, sorted(right)))}")
    if missed:
        sys.exit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
