"""Who may read the dashboard: one password, sessions in memory, and a bound on attempts."""

import hashlib
import hmac
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable

SESSION_S = 12 * 3600.0
MOST_SESSIONS = 1000  # the oldest one ends if there are more
ATTEMPTS = 5  # that failed, of one address in ATTEMPTS_S seconds
ATTEMPTS_OF_ALL = 100
ATTEMPTS_S = 60.0
COOKIE = "fedmoe_session"


class Login:
    """The password and the sessions; without a password everybody may read.

    Args:
        password: that readers must give, "" for none.
        clock: seconds, monotonic.
    """

    def __init__(self, password: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._password = _digest(password)
        self.is_needed = bool(password)
        self._clock = clock
        self._sessions: OrderedDict[bytes, float] = OrderedDict()  # digest of the token → its end
        self._failed: deque[tuple[float, str]] = deque(maxlen=ATTEMPTS_OF_ALL)
        self._lock = threading.Lock()

    def wait_s(self, address: str) -> float:
        """Seconds until this address may try again, 0 if it may now."""
        with self._lock:
            now = self._clock()
            while self._failed and self._failed[0][0] <= now - ATTEMPTS_S:
                self._failed.popleft()
            own = [at for at, who in self._failed if who == address]
            first = own[-ATTEMPTS] if len(own) >= ATTEMPTS else None
            if len(self._failed) == ATTEMPTS_OF_ALL:
                first = max(first or 0.0, self._failed[0][0])
            return 0.0 if first is None else first + ATTEMPTS_S - now

    def is_password(self, given: str, address: str) -> bool:
        """True if it is the password; a failure counts. Ask `wait_s` first."""
        if hmac.compare_digest(_digest(given), self._password):
            return True
        with self._lock:
            self._failed.append((self._clock(), address))
        return False

    def begin(self) -> str:
        """The token of a new session."""
        token = secrets.token_urlsafe(32)
        with self._lock:
            self._sessions[_digest(token)] = self._clock() + SESSION_S
            while len(self._sessions) > MOST_SESSIONS:
                self._sessions.popitem(last=False)
        return token

    def is_session(self, token: str) -> bool:
        """True if it is the token of a session that has not ended."""
        with self._lock:
            return self._sessions.get(_digest(token), 0.0) > self._clock()

    def end(self, token: str) -> None:
        """End a session."""
        with self._lock:
            self._sessions.pop(_digest(token), None)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()
