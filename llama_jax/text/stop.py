"""Stop strings: text that ends an answer and is not part of it."""

from collections.abc import Sequence


class StopCutter:
    """Pass text on as it comes, up to the stop string that is spelt out first.

    What may be the beginning of one is held back until it is known: so the pieces that were passed
    on are the same text, however it was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = stops
        self._held = ""
        self.stopped = False
        """A stop string has come; nothing is passed on any more."""

    def push(self, text: str) -> str:
        """Take more text; return what is certainly part of the answer."""
        if self.stopped:
            return ""
        text = self._held + text
        places = [(text.find(stop), len(stop)) for stop in self._stops]
        # By its end: which begins first may not be known yet when one is spelt out.
        found = min(((at + length, at) for at, length in places if at >= 0), default=None)
        if found:
            self.stopped, self._held = True, ""
            return text[: found[1]]
        kept = len(text) - max((self._beginning(text, stop) for stop in self._stops), default=0)
        self._held = text[kept:]
        return text[:kept]

    def finish(self) -> str:
        """Return what was held back, as no more text will come."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _beginning(text: str, stop: str) -> int:
        """Return how many characters at the text's end are the stop string's beginning."""
        longest = min(len(stop) - 1, len(text))
        return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
