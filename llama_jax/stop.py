"""Stop strings: text that ends an answer and is not part of it."""

from collections.abc import Sequence


class StopCutter:
    """Pass text on as it comes, up to the first stop string.

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
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
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
