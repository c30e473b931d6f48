"""Other ways to write a question: its case, its punctuation, its small words, its synonyms."""

import random
import re


def normal(text: str) -> str:
    """Return a question without case, punctuation and articles: two such are one question."""
    return re.sub(r"\b(the|a|an) ", "", " ".join(re.findall(r"[\w+*/=-]+", text.lower())))


def style(text: str, rng: random.Random) -> str:
    """Return a question with the case and the punctuation of someone in a hurry."""
    kind = rng.random()
    if kind < 0.5:
        text = text.lower()
    if rng.random() < 0.6:
        bare = text.rstrip("?.! ")
        text = bare + rng.choice(["", "", "", "?", "??", "!", ".", " ?"]) if bare else text
    return text


def loosen(text: str, small: list[str], fillers: list[str], rng: random.Random) -> str:
    """Return a question with a small word more, or without one of its small words."""
    words = text.split()
    places = [i for i, word in enumerate(words) if word.lower() in small]
    if places and rng.random() < 0.5:
        del words[rng.choice(places)]
    else:
        words.insert(rng.randint(1, len(words)), rng.choice(fillers))
    return " ".join(words)


def reword(text: str, synonyms: dict[str, list[str]], rng: random.Random) -> str:
    """Return a question with one of its words replaced by another of the same sense."""
    words = text.split()
    places = [i for i, word in enumerate(words) if word.lower().strip("?.!,") in synonyms]
    if not places:
        return text
    place = rng.choice(places)
    word = words[place].lower().strip("?.!,")
    words[place] = words[place].lower().replace(word, rng.choice(synonyms[word]))
    return " ".join(words)
