"""Whether a thread still gets anywhere, seen from outside. Pure standard library."""

import sys
from collections import deque
from types import CodeType

Place = tuple[tuple[CodeType, int | None], ...]

# A loop that polls is seen at a few places only, again and again: it waits. Work is seen at many.
_NUM_PLACES = 8


def place_of(thread: int) -> Place:
    """Say which line of which function a thread is at, the innermost first.

    Args:
        thread: Its identifier; one that is not running is nowhere.
    """
    frame = sys._current_frames().get(thread)
    lines = []
    while frame is not None:
        lines.append((frame.f_code, frame.f_lineno))
        frame = frame.f_back
    return tuple(lines)


class Stillness:
    """Measures for how long looks at something have found nothing new.

    New are another count of events, a place that is none of the last few different ones, and a
    long time without a look: whatever kept the looks from happening is over.

    Args:
        now: When it begins, in seconds.
        longest_gap: Seconds between two looks above which nothing can be said.

    Attributes:
        moved_at: When something new was found last, in seconds.
    """

    def __init__(self, now: float, longest_gap: float) -> None:
        self.moved_at = now
        self._longest_gap = longest_gap
        self._looked_at = now
        self._num_events = 0
        self._places: deque[Place] = deque(maxlen=_NUM_PLACES)

    def look(self, now: float, num_events: int, place: Place) -> float:
        """Take a look; return for how many seconds nothing has moved."""
        is_known = place in self._places
        if is_known:
            self._places.remove(place)
        self._places.append(place)
        was_away = now - self._looked_at > self._longest_gap
        if was_away or not is_known or num_events != self._num_events:
            self.moved_at = now
        self._looked_at, self._num_events = now, num_events
        return now - self.moved_at
