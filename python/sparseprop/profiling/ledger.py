"""A stop-watch that always charges somebody: entries nest, and every instant counts for the innermost one."""

import time
from collections import defaultdict
from collections.abc import Callable

__all__ = ["Key", "Ledger"]

Key = tuple[str, str]  # who, doing what


class Ledger:
    """Exclusive seconds by key, a partition of the time between the first `enter` and the last `leave`.

    >>> ticks = iter([0.0, 1.0, 4.0, 5.0])
    >>> ledger = Ledger(clock=lambda: next(ticks))
    >>> ledger.enter(("outer", "forward")); ledger.enter(("inner", "forward"))
    >>> ledger.leave(); ledger.leave()
    >>> ledger.seconds[("outer", "forward")], ledger.seconds[("inner", "forward")]
    (2.0, 3.0)
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: defaultdict[Key, float] = defaultdict(float)
        self._clock = clock
        self._running: list[Key] = []
        self._since = 0.0

    def enter(self, key: Key) -> None:
        """From now on, time counts for `key`, until `leave` or a further `enter`."""
        self._charge()
        self._running.append(key)

    def leave(self) -> None:
        """From now on, time counts for whoever it counted for before the last `enter`."""
        self._charge()
        self._running.pop()

    @property
    def current(self) -> Key | None:
        """Whose time it is."""
        return self._running[-1] if self._running else None

    def _charge(self) -> None:
        now = self._clock()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now
