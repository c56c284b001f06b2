"""How many pixels a picture has: few while one moves, all of them once one is still."""

from __future__ import annotations

from jaxngp.viewing.poses import Viewpoint

FRAME_SECONDS = 0.045
"""For drawing a picture while one moves: one asked for while another is drawn is there within twice that, and 10 ms to
encode and send it."""

STILL_SECONDS = 0.15
"""After the last move, before a picture is refined."""

GROWTH = 4
"""How many times as many pixels the next, finer picture has."""

REFRESH_SECONDS = 2.0
REFRESH_SHARE = 0.1
"""While nobody moves, a picture is drawn anew from a newer state of the training: no sooner, and for no larger share
of the time."""


class Pace:
    """The number of pixels that can be drawn in a given time, from how long pictures took."""

    def __init__(self, *, seconds: float = FRAME_SECONDS, smallest: int, largest: int = 2**21) -> None:
        self._seconds, self._smallest, self._largest = seconds, smallest, largest
        self.pixels = float(smallest)

    def took(self, seconds: float) -> None:
        """Note how long a picture of `pixels` took.

        The time grows as a power of the pixels that is at most 1, so each step takes off 0.4 to 1 times the distance to
        the target in logarithms; but a single slow picture changes little.
        """
        ratio = min(max(self._seconds / max(seconds, 1e-6), 0.25), 2.0)
        self.pixels = min(max(self.pixels * ratio**0.7, self._smallest), self._largest)


class Canvas:
    """What one browser window shows, and what it is to show next. Times are seconds of a clock that only rises."""

    def __init__(self) -> None:
        self.viewpoint: Viewpoint | None = None
        self.revision = 0  # counts moves and other changes: a picture of an earlier one is out of date
        self.drawn = 0  # pixels of the finest picture of this revision
        self.changed = 0.0
        self._version = -1  # of the scene that is shown
        self._refresh = 0.0  # when a newer one may be drawn

    def change(self, now: float, viewpoint: Viewpoint | None = None) -> None:
        """Look from elsewhere, or at something else."""
        self.viewpoint = viewpoint or self.viewpoint
        self.revision, self.drawn, self.changed = self.revision + 1, 0, now

    def wanted(self, now: float, *, moving: float, version: int, limit: int) -> int:
        """How many pixels the next picture is to have; 0: none is needed now.

        moving: pixels of a picture while one moves. version: of the newest scene. limit: pixels along the longer side.
        """
        if self.viewpoint is None:
            return 0
        full = self._full(limit)
        if not self.drawn:
            return min(round(moving), full)
        if self.drawn < full:
            return min(self.drawn * GROWTH, full) if now >= self.changed + STILL_SECONDS else 0
        return full if version != self._version and now >= self._refresh else 0

    def urgent(self) -> bool:
        """Whether nothing is shown yet of where one looks now."""
        return self.viewpoint is not None and not self.drawn

    def show(self, now: float, *, pixels: int, seconds: float, version: int) -> None:
        """Note a picture of this revision, and how long it took."""
        self.drawn, self._version = pixels, version
        self._refresh = now + max(REFRESH_SECONDS, seconds * (1 / REFRESH_SHARE - 1))

    def _full(self, limit: int) -> int:
        assert self.viewpoint is not None
        width, height = self.viewpoint.width, self.viewpoint.height
        scale = min(1.0, limit / max(width, height))
        return max(1, round(width * scale) * round(height * scale))
