"""A proxy on loopback before an object store that breaks answers by a plan: what networks and busy stores do."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
INTERNAL = b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>"
DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
REFUSALS = {
    "403": (b"403 Forbidden", DENIED),
    "500": (b"500 Internal Server Error", INTERNAL),
    "502": (b"502 Bad Gateway", b"<html>upstream"),
    "503": (b"503 Slow Down", SLOW_DOWN),
}
LONGEST_S = 20.0
"""A stalled or trickling answer ends after this."""


@dataclass(frozen=True)
class Request:
    method: str
    path: str  # /bucket/key, without the query
    query: str
    span: str  # of the Range header
    times: int  # how often it came before
    key_id: str  # that signed it

    @property
    def key(self) -> tuple[str, ...]:
        """Equal for tries of one request; upload ids differ between runs."""
        names = sorted(word for word in self.query.split("&") if not word.lower().startswith("uploadid="))
        return (self.method, self.path, "&".join(names), self.span)


def seeded(seed: int, kinds: list[str], most: int) -> Callable[[Request], str | None]:
    """Every request meets 0 to `most` faults before it is answered, whichever thread sends it when."""

    def fault(request: Request) -> str | None:
        draws = random.Random(f"{seed} {request.key}")
        planned = [draws.choice(kinds) for _ in range(draws.randint(0, most))]
        return planned[request.times] if request.times < len(planned) else None

    return fault


class FaultyStore:
    """`plan` decides the fault of every request (None: none); `seen` are the requests that came.

    reset, stall: no answer. trickle: a byte at a time. lost: done, but the connection is reset instead of an answer.
    truncate: half a body. short: half a body that claims to be whole. zeros: a body of zeros. 403, 500, 502, 503.
    """

    def __init__(self, host: str, port: int) -> None:
        self._upstream = (host, port)
        self.plan: Callable[[Request], str | None] = lambda request: None
        self.seen: list[Request] = []
        self.stalled_s: list[float] = []
        """How long each stalled answer was waited for."""
        self._times: Counter[tuple[str, ...]] = Counter()
        self._lock, self._over = threading.Lock(), threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def reset(self) -> None:
        with self._lock:
            self.plan = lambda request: None
            self.seen.clear()
            self.stalled_s.clear()
            self._times.clear()

    def close(self) -> None:
        self._over.set()
        self._listener.shutdown(socket.SHUT_RDWR)  # close alone leaves the thread that accepts waiting
        self._listener.close()

    def _accept(self) -> None:
        while not self._over.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        client.settimeout(LONGEST_S)
        with client, contextlib.suppress(OSError):
            received = _received(client)
            if received is None:
                return
            request, head, body = self._noted(*received)
            fault = self.plan(request)
            if fault == "reset":
                _reset(client)
            elif fault == "stall":
                start = time.monotonic()
                self._wait(client)
                self.stalled_s.append(time.monotonic() - start)
            elif fault in REFUSALS:
                status, content = REFUSALS[fault]
                content = b"" if request.method == "HEAD" else content
                client.sendall(b"HTTP/1.1 %s\r\n%s" % (status, _ending(len(content))) + content)
            else:
                self._pass_on(client, request, head, body, fault)

    def _pass_on(self, client: socket.socket, request: Request, head: bytes, body: bytes, fault: str | None) -> None:
        answer = self._ask(head, body)
        if fault == "lost":
            _reset(client)
            return
        head, _, content = answer.partition(b"\r\n\r\n")
        if fault == "trickle":
            for byte in answer:
                client.sendall(bytes([byte]))
                if self._over.wait(0.1):
                    return
        if request.method == "HEAD" or fault is None:
            client.sendall(answer)
            return
        half = content[: len(content) // 2]
        if fault == "truncate":
            content = half
        elif fault == "short":
            lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"content-length")]
            head, content = b"\r\n".join([*lines, b"Content-Length: %d" % len(half)]), half
        elif fault == "zeros":
            content = bytes(len(content))
        client.sendall(head + b"\r\n\r\n" + content)

    def _ask(self, head: bytes, body: bytes) -> bytes:
        with socket.create_connection(self._upstream, timeout=LONGEST_S) as upstream:
            upstream.sendall(head + body)
            parts = []
            while part := upstream.recv(1 << 20):
                parts.append(part)
            return b"".join(parts)

    def _noted(self, head: bytes, body: bytes) -> tuple[Request, bytes, bytes]:
        lines = head.split(b"\r\n")
        method, target, _ = lines[0].decode().split(" ")
        path, _, query = target.partition("?")
        headers = {
            name.lower(): value.strip() for name, _, value in (line.decode().partition(":") for line in lines[1:])
        }
        key_id = headers.get("authorization", "").partition("Credential=")[2].partition("/")[0]
        first = Request(method, path, query, headers.get("range", ""), 0, key_id)
        with self._lock:
            request = replace(first, times=self._times[first.key])
            self._times[first.key] += 1
            self.seen.append(request)
        kept = [line for line in lines if not line.lower().startswith((b"connection:", b"expect:"))]
        return request, b"\r\n".join([*kept, b"Connection: close"]) + b"\r\n\r\n", body

    def _wait(self, client: socket.socket) -> None:
        """Until the client gives up."""
        client.settimeout(0.1)
        end = time.monotonic() + LONGEST_S
        while not self._over.is_set() and time.monotonic() < end:
            with contextlib.suppress(TimeoutError):
                if not client.recv(1):
                    return


def _received(client: socket.socket) -> tuple[bytes, bytes] | None:
    """Head and body of one request; None where the client closes instead."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = client.recv(1 << 16)
        if not part:
            return None
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    lower = head.lower()
    if b"expect: 100-continue" in lower:
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    length = next((int(line.split(b":")[1]) for line in lower.split(b"\r\n") if line.startswith(b"content-length:")), 0)
    parts, got = [body], len(body)
    while got < length:
        part = client.recv(1 << 20)
        if not part:
            return None
        parts.append(part)
        got += len(part)
    return head, b"".join(parts)


def _ending(length: int) -> bytes:
    return b"Content-Type: application/xml\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % length


def _reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
