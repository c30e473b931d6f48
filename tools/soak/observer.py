"""The observer: what a health check and a polite client see, from a process of its own.

Blocking sockets in threads: no event loop of the load delays what is measured. How late this
process itself is woken is measured too, and is part of every latency here.
"""

import contextlib
import dataclasses
import http.client
import json
import resource
import threading
import time
import urllib.parse
from collections.abc import Callable

from tools.soak.answers import Known
from tools.soak.server import TOKEN

ADDRESS = "127.0.0.2"
PROBE_S, PAUSE_S, WAKE_S = 0.2, 0.1, 0.05
"""Between health checks, the polite client's requests, and looks at how late this process is."""
HEALTH_NEW, HEALTH_KEPT = "/healthz, new connection", "/healthz, kept connection"
POLITE, LATE = "polite client", "observer woken late"


@dataclasses.dataclass
class Seen:
    """What was seen."""

    latencies: dict[str, list[tuple[float, float]]]
    """By name: when each began, on `time.monotonic`, and the seconds that it took."""
    problems: list[str]
    cpu_s: float = 0


class Observer:
    """Observe a server until a moment.

    Args:
        url: the server's.
        known: the polite client's request.
        end: when to stop, on `time.monotonic`.
    """

    def __init__(self, url: str, known: Known, end: float):
        self._known, self._end = known, end
        address = urllib.parse.urlsplit(url)
        self._host, self._port = address.hostname or "", address.port
        self._kept = self._connection()
        self._polite = self._connection()
        self.seen = Seen({name: [] for name in (HEALTH_NEW, HEALTH_KEPT, POLITE, LATE)}, [])

    def run(self) -> Seen:
        """Return what was seen."""
        threads = [
            threading.Thread(target=self._repeat, args=(HEALTH_NEW, self._check_anew, PROBE_S)),
            threading.Thread(target=self._repeat, args=(HEALTH_KEPT, self._check_kept, PROBE_S)),
            threading.Thread(target=self._repeat, args=(POLITE, self._ask, PAUSE_S)),
            threading.Thread(target=self._watch_self),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        usage = resource.getrusage(resource.RUSAGE_SELF)
        self.seen.cpu_s = usage.ru_utime + usage.ru_stime
        return self.seen

    def _repeat(self, name: str, act: Callable[[], None], pause_s: float) -> None:
        while (began := time.monotonic()) < self._end:
            try:
                act()
            except Exception as error:
                self.seen.problems.append(f"{name}: {type(error).__name__}: {error}"[:300])
            else:
                self.seen.latencies[name].append((began, time.monotonic() - began))
            time.sleep(pause_s)

    def _watch_self(self) -> None:
        while (began := time.monotonic()) < self._end:
            time.sleep(WAKE_S)
            self.seen.latencies[LATE].append((began, time.monotonic() - began - WAKE_S))

    def _check_anew(self) -> None:
        with contextlib.closing(self._connection()) as connection:
            self._check(connection)

    def _check_kept(self) -> None:
        self._check(self._kept)

    def _check(self, connection: http.client.HTTPConnection) -> None:
        status, content = _exchange(connection, "GET", "/healthz")
        if (status, content) != (http.client.OK, b"ok\n"):
            raise RuntimeError(f"{status} {content!r:.80}")

    def _ask(self) -> None:
        answer = _exchange(self._polite, "POST", self._known.path, json.dumps(self._known.body))
        self._known.check(*answer)

    def _connection(self) -> http.client.HTTPConnection:
        source = (ADDRESS, 0)
        return http.client.HTTPConnection(self._host, self._port, 60, source_address=source)


def observe(url: str, known: Known, end: float) -> Seen:
    """Observe a server until a moment: `Observer`, for a process of its own."""
    return Observer(url, known, end).run()


def _exchange(
    connection: http.client.HTTPConnection, method: str, path: str, body: str | None = None
) -> tuple[int, bytes]:
    """Return the status and body of an answer."""
    try:
        connection.request(method, path, body, {"authorization": f"Bearer {TOKEN}"})
        with connection.getresponse() as response:
            return response.status, response.read()
    except BaseException:  # whatever it is: half an answer must not be read as the next one's
        connection.close()  # the next request opens it anew
        raise
