"""How much training runs beside serving."""

import math
import time
from collections.abc import Callable

_PATIENCE = 1.0  # seconds that a queue may last before the share is halved, and between halvings: longer than a prefill
_RECOVERY = 10.0  # seconds without a queue that bring the share back from nothing
_USUAL_SECONDS = 10.0  # over which the usual size of the batch is averaged
_QUIET_SECONDS = 10.0  # without a request, after which the engine counts as idle: few requests come after such a gap
_SMOOTHING = 0.2  # weight of the latest piece in the expected cost of the next


class Pacer:
    """Says before each piece of training whether it may run now.

    With no request in the engine it always may. While a request waits to be admitted it never may. Beside running
    requests training earns ``share`` of the time that passes and spends what a piece takes, as long as there are no
    more of them than usual: a burst has the engine to itself, as the slowest answers are those of bursts. Where
    requests keep waiting, the share is halved until they do not, and then grows back.

    Args:
        share: of the time, from 0 to below 1.
        clock: seconds; monotonic.
    """

    def __init__(self, share: float, clock: Callable[[], float] = time.monotonic):
        self.current_share = share
        self.backoffs = 0
        self._share = share
        self._clock = clock
        self._last = clock()
        self._last_request = -math.inf
        self._waiting_since: float | None = None
        self._usual = 0.0
        self._credit = 0.0
        self._cost = 0.0

    def saw_requests(self) -> None:
        """There are requests in the engine now."""
        self._last_request = self._clock()

    @property
    def quiet(self) -> bool:
        """Whether no request has come for a while: a piece may be long, as it is unlikely that one will wait for it."""
        return self._clock() - self._last_request > _QUIET_SECONDS

    def allows(self, running: int, waiting: int) -> bool:
        """Whether a piece may run now, beside ``running`` requests in the batch and ``waiting`` ones in the queue."""
        now = self._clock()
        elapsed, self._last = now - self._last, now
        self._usual += (running - self._usual) * -math.expm1(-elapsed / _USUAL_SECONDS)
        if waiting:
            self._back_off(now)
            return False
        self._waiting_since = None
        self.current_share = min(self._share, self.current_share + self._share * elapsed / _RECOVERY)
        if not running:
            self._credit = 0.0
            return True
        self._credit = min(self._credit + self.current_share * elapsed, 2 * self._cost)
        return self.current_share > 0 and running <= math.ceil(self._usual) and self._credit >= self._cost

    def ran(self, seconds: float, running: int) -> None:
        """A piece took so long."""
        self._cost = seconds if self._cost == 0 else (1 - _SMOOTHING) * self._cost + _SMOOTHING * seconds
        if running:
            self._credit -= seconds

    def _back_off(self, now: float) -> None:
        """A request that arrives is admitted at once and waits for no time; a queue lasts."""
        if self._waiting_since is None:
            self._waiting_since = now
        elif now - self._waiting_since > _PATIENCE:
            self._waiting_since = now
            self.current_share /= 2
            self.backoffs += 1
