"""Stop strings: an answer ends before the first of them."""

from collections.abc import Sequence


class StopCutter:
    """Pass streamed text on, up to the stop string that is complete first.

    Text that may be the beginning of a stop string is held back until that is decided. So what is
    passed on does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = stops
        self._held = ""
        self.stopped = False
        """A stop string was found; nothing more is passed on."""

    def push(self, text: str) -> str:
        """Take more text; return what is certain to be part of the answer."""
        if self.stopped:
            return ""
        text = self._held + text
        places = [(text.find(stop), len(stop)) for stop in self._stops]
        # The first to end: when one is complete, it may be open whether another began before it.
        found = min(((at + length, at) for at, length in places if at >= 0), default=None)
        if found:
            self.stopped, self._held = True, ""
            return text[: found[1]]
        kept = len(text) - max((self._beginning(text, stop) for stop in self._stops), default=0)
        self._held = text[kept:]
        return text[:kept]

    def finish(self) -> str:
        """Return what was held back; no more text follows."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _beginning(text: str, stop: str) -> int:
        """Return how many characters at the end of the text begin the stop string."""
        longest = min(len(stop) - 1, len(text))
        return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
