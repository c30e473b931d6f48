"""The demo model's questions as people put them: phrasings, cases, openings, and refusals."""

import collections
import random
import re
from collections.abc import Collection

from tools.demo_corpus import REFUSAL, Corpus, Frames
from tools.demo_phrasing import loosen, normal, reword, style

_NUMBER_KIND, _PSEUDO_KIND = "number", "pseudo"
_MEMBER_LIKE = 0.35
"""How many of the unknown words are made from known ones, or made up."""
_WEIGHTS = {"place": 6, "city": 2, "number": 3, "word": 4, "thing": 3, "other": 5}
"""How often unknown words of a kind are put in frames; of the other kinds, 1."""


class Questions:
    """An endless source of (question, answer)."""

    def __init__(self, corpus: Corpus, held_back: Collection[str] = ()):
        """Questions of a corpus, and none that is put as one of `held_back`."""
        self.corpus = corpus
        self.held_back = {normal(text) for text in held_back}
        self._small = corpus.words["small"]
        self.members: dict[str, list[list[str]]] = collections.defaultdict(list)
        """Of each first frame, the words that the corpus has for its fields."""
        self.own = [phrasings for phrasings, _ in corpus.questions]
        self.answers = [answer for _, answer in corpus.questions]
        found = [self._variants(phrasings) for phrasings in self.own]
        owners = collections.defaultdict(set)
        for i, texts in enumerate(found):
            for text in texts:
                owners[normal(text)].add(i)
        for i, phrasings in enumerate(self.own):
            for text in phrasings:  # a phrasing of the corpus itself is nobody else's
                owners[normal(text)] = {i}
        self.variants = [
            [text for text in texts if owners[normal(text)] == {i} and self._is_free(text)]
            for i, texts in enumerate(found)
        ]
        self.known = set(owners)
        self.weights = [
            0 if frames.kinds == ["weekday"] else _WEIGHTS.get(frames.kinds[0], 1)
            for frames in corpus.frames
        ]

    def draw(self, rng: random.Random, refused: float) -> tuple[str, str]:
        """Return a question and its answer; a share `refused` of the questions has none."""
        while True:
            text, answer = self._pair(rng, refused)
            text = self._otherwise(text, rng)
            if self._is_free(text):
                return text, answer

    def _pair(self, rng: random.Random, refused: float) -> tuple[str, str]:
        if rng.random() < refused:
            return self._unknown(rng), REFUSAL
        i = rng.randrange(len(self.own))
        kind = rng.random()
        if kind < 0.6 and self.variants[i]:
            return rng.choice(self.variants[i]), self.answers[i]
        # The first phrasing is the one that people see suggested.
        return self.own[i][0] if kind < 0.7 else rng.choice(self.own[i]), self.answers[i]

    def _otherwise(self, text: str, rng: random.Random) -> str:
        """Return a question with other words, openings, case or punctuation."""
        if rng.random() < 0.3:
            text = reword(text, self.corpus.synonyms, rng)
        if rng.random() < 0.2:
            text = loosen(text, self._small, self.corpus.words["filler"], rng)
        if rng.random() < 0.15:
            opening = rng.choice(self.corpus.openings)
            if opening[0] != "{" and "." not in opening and rng.random() < 0.7:
                text = text[:1].lower() + text[1:]
            text = opening.format(text)
        return style(text, rng) if rng.random() < 0.4 else text

    def _is_free(self, text: str) -> bool:
        return normal(text) not in self.held_back

    def _variants(self, phrasings: list[str]) -> list[str]:
        """Return other ways to put a question of the corpus."""
        texts = []
        for phrasing in phrasings:
            for frames in self.corpus.frames:
                fields = _fields(frames.texts[0], phrasing)
                if fields is not None and frames.kinds != ["other"]:
                    self.members[frames.texts[0]].append(fields)
                    texts += [frame.format(*fields) for frame in frames.texts]
                    if in_words := self._spelled(frames, fields):
                        texts += [frame.format(*in_words) for frame in frames.texts]
                    break  # the first is the most special
            words = re.findall(r"[^\s?!,;]+", phrasing.rstrip("."))
            content = [word for word in words if word.lower() not in self._small]
            if 0 < len(content) < len(words):
                texts += [" ".join(content)] * 3
        return texts

    def _unknown(self, rng: random.Random) -> str:
        """Return a question that the corpus does not have."""
        while True:
            [frames] = rng.choices(self.corpus.frames, self.weights)
            if frames.kinds[0] == _NUMBER_KIND:
                fields = [str(n) for n in self._numbers(frames, rng)]
                if rng.random() < 0.3:
                    fields = self._spelled(frames, fields) or fields
            else:
                fields = self._words(frames, rng)
            text = rng.choice(frames.texts).format(*fields)
            if normal(text) not in self.known and self._is_free(text):
                return text

    def _words(self, frames: Frames, rng: random.Random) -> list[str]:
        """Return words for a frame's fields, not both of them known."""
        kinds = frames.kinds
        if kinds == ["word", "language"]:
            known = self.members[frames.texts[0]]
            near = rng.choice(known)[0], rng.choice(known)[1]
            chosen = rng.random() < 0.5, rng.random() < 0.5  # both: of two different questions
            return [
                near[i] if chosen[i] else rng.choice(self.corpus.unknown[kind])
                for i, kind in enumerate(kinds)
            ]
        kind = rng.choice(kinds)
        if kind == "counted":
            return rng.choice(self.corpus.unknown[kind]).split(" / ")
        if kind == "other":
            return [rng.choice(self.corpus.unknown[kind])]
        return [self._word(frames, kind, rng)]

    def _word(self, frames: Frames, kind: str, rng: random.Random) -> str:
        members = [fields[0] for fields in self.members[frames.texts[0]]]
        made_up = rng.random() < _MEMBER_LIKE
        if kind == _PSEUDO_KIND:
            return self._pseudo(rng)
        words = self.corpus.unknown[kind]
        if not made_up or kind in ("action", "claim", "other") or not members:
            return rng.choice(words)
        if kind == "animal" and rng.random() < 0.5:  # known, but for another question
            return rng.choice(
                [each[0] for known in self.members.values() for each in known if " " not in each[0]]
            )
        if rng.random() < 0.3:
            word = self._pseudo(rng)
            return word.capitalize() if kind in ("place", "city") else word
        member, word = rng.choice(members), rng.choice(words)
        if rng.random() < 0.5:
            return _splice(member, word, rng)
        return _splice(word, member, rng)

    def _numbers(self, frames: Frames, rng: random.Random) -> list[int]:
        """Return two numbers, often those of a known question but for one of them."""
        if rng.random() < 0.4:
            near = [int(field) for field in rng.choice(self.members[frames.texts[0]])]
            near[rng.randrange(2)] += rng.choice([-2, -1, 1, 2])
            return [abs(n) for n in near]
        top = rng.choice([9, 9, 12, 20, 100, 1000])
        return [rng.randint(0, top), rng.randint(0, rng.choice([9, top]))]

    def _spelled(self, frames: Frames, fields: list[str]) -> list[str] | None:
        """Return the numbers of a frame as words, or None if there are none, or larger ones."""
        words = self.corpus.words["number"]
        if frames.kinds[0] != _NUMBER_KIND or max(map(int, fields)) >= len(words):
            return None
        return [words[int(field)] for field in fields]

    def _pseudo(self, rng: random.Random) -> str:
        """Return a word that nobody has heard of."""
        syllables = [onset + vowel for onset in self.corpus.words["onset"] for vowel in "aeiou"]
        endings = ["", *self.corpus.words["ending"]]
        return "".join(rng.choices(syllables, k=rng.randint(1, 3))) + rng.choice(endings)


def _fields(frame: str, text: str) -> list[str] | None:
    """Return what stands in a frame's fields, or None if it does not fit the text."""
    pattern = re.escape(frame).replace(r"\{0\}", "(.+?)").replace(r"\{1\}", "(.+?)")
    match = re.fullmatch(pattern, text)
    return list(match.groups()) if match else None


def _splice(begin: str, end: str, rng: random.Random) -> str:
    """Return the beginning of one word and the end of another."""
    cut = rng.randint(1, max(1, len(begin) - 1))
    return begin[:cut] + end[rng.randint(min(1, len(end) - 1), max(1, len(end) - 1)) :]
