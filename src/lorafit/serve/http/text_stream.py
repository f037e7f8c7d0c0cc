"""TextStream: tokens to text, piece by piece, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from lorafit.data import TextTokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Decode a growing answer. Pieces are complete characters, and hold no beginning of a stop string back for long.

    Attributes:
        ids: the tokens so far.
        stopped: True once a stop string has appeared; the text ends before it.
    """

    def __init__(self, tokenizer: TextTokenizer, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.ids: list[int] = []
        self.stopped = False
        self._text = ""  # decoded so far
        self._sent = 0  # characters of it that were returned
        # a window of tokens is decoded anew, as decoders look at a token's neighbours
        self._window, self._read = 0, 0

    def add(self, token: int) -> str:
        """Add a token, and return the text that is certain now."""
        self.ids.append(token)
        before = self.tokenizer.decode(self.ids[self._window : self._read])
        now = self.tokenizer.decode(self.ids[self._window :])
        if now.endswith(UNFINISHED) or not now.startswith(before):
            return ""
        self._text += now[len(before) :]
        self._window, self._read = self._read, len(self.ids)
        return self._certain(self._held_back())

    def finish(self) -> str:
        """Return the rest of the text."""
        whole = self.tokenizer.decode(self.ids)
        if not self.stopped and whole.startswith(self._text):
            self._text = whole
        return self._certain(0)

    def _certain(self, held_back: int) -> str:
        if not self.stopped:
            found = [place for stop in self.stops if (place := self._text.find(stop, self._first(stop))) >= 0]
            if found:
                self._text, self.stopped, held_back = self._text[: min(found)], True, 0
        end = max(self._sent, len(self._text) - held_back)
        piece, self._sent = self._text[self._sent : end], end
        return piece

    def _first(self, stop: str) -> int:
        return max(0, self._sent - len(stop))

    def _held_back(self) -> int:
        """Return the length of the longest end of the text that may begin a stop string."""
        longest = max(map(len, self.stops), default=1) - 1
        for length in range(min(longest, len(self._text)), 0, -1):
            end = self._text[-length:]
            if any(stop.startswith(end) for stop in self.stops):
                return length
        return 0
