"""How nodes reach each other: a listener on each that tells the time, takes and sends bytes, and lets them meet."""

from __future__ import annotations

import json
import re
import socket
import socketserver
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CHUNK = 1 << 18
_MOST = 64 << 20
_SECONDS = 0.15
_TIMEOUT = 10.0
_PINGS = 5
_FIB_TRIE = Path("/proc/net/fib_trie")


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Where another node listens."""

    index: int
    node: str
    hosts: tuple[str, ...]
    """Its name first, then its addresses."""
    port: int


class UnreachableError(OSError):
    """A node that answers under none of its names and addresses."""


class Listener(socketserver.ThreadingTCPServer):
    """Answers the other nodes of one examination, which know its token, until it is closed."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, index: int, token: str, nodes: int) -> None:
        super().__init__(("", 0), _Answer)
        self.index, self.token, self.nodes = index, token, nodes
        self.port: int = self.socket.getsockname()[1]
        self.met: dict[str, set[int]] = {}
        self.changed = threading.Condition()
        self.local_address: str | None = None
        """Address of this node under which another one came."""
        threading.Thread(target=self.serve_forever, name="listener", daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Leave a broken connection to the node that made it, which reports it."""

    def meet(self, name: str, index: int, seconds: float) -> bool:
        """Wait until all nodes are at the same point; False where one does not come in time."""
        with self.changed:
            self.met.setdefault(name, set()).add(index)
            self.changed.notify_all()
            return self.changed.wait_for(lambda: len(self.met[name]) >= self.nodes, timeout=seconds)


class _Answer(socketserver.StreamRequestHandler):
    server: Listener
    timeout = 2 * _TIMEOUT

    def handle(self) -> None:
        asked = json.loads(self.rfile.readline(4096))
        if asked.get("token") != self.server.token:
            return
        if asked["ask"] == "time":
            self.server.local_address = self.request.getsockname()[0]
            self._say({"node": self.server.index, "time": time.time()})
        elif asked["ask"] == "swallow":
            count = left = min(int(asked["bytes"]), _MOST)
            while left:
                left -= len(self.rfile.read(min(left, _CHUNK))) or left
            self._say({"bytes": count})
        elif asked["ask"] == "pour":
            self.wfile.write(bytes(min(int(asked["bytes"]), _MOST)))
        elif asked["ask"] == "meet":
            self.request.settimeout(None)
            together = self.server.meet(str(asked["name"]), int(asked["index"]), float(asked["seconds"]))
            self._say({"met": together})

    def _say(self, answer: dict[str, Any]) -> None:
        self.wfile.write((json.dumps(answer) + "\n").encode())


class Line:
    """A way to another node's listener, found once and used for every question."""

    def __init__(self, peer: Peer, token: str) -> None:
        """Find the first name or address that answers; raises `UnreachableError` naming what each of them said."""
        self.peer, self._token = peer, token
        self.by_name = True
        """Whether the node answered under its name."""
        failures = []
        for host in peer.hosts:
            self._host = host
            try:
                answer = self._ask({"ask": "time"})
                if answer["node"] != peer.index:
                    # Two networks with the same addresses, as container bridges have.
                    raise OSError(f"node {answer['node']} answers there")
            except (OSError, ValueError) as error:
                self.by_name = False
                failures.append(f"{host}: {error or 'no answer'}")
            else:
                return
        raise UnreachableError(f"{peer.node} port {peer.port}: {'; '.join(failures)}")

    def clock_offset(self) -> float:
        """Return the seconds that the other clock is ahead of this one (Cristian's algorithm, the quickest answer)."""
        best, offset = float("inf"), 0.0
        for _ in range(_PINGS):
            before = time.time()
            answer = self._ask({"ask": "time"})
            after = time.time()
            if after - before < best:
                best, offset = after - before, float(answer["time"]) - (before + after) / 2
        return offset

    def meet(self, name: str, index: int, seconds: float) -> bool:
        """Wait at the other node until all nodes are there."""
        asked = {"ask": "meet", "name": name, "index": index, "seconds": seconds}
        return bool(self._ask(asked, timeout=seconds + _TIMEOUT)["met"])

    def bandwidth(self) -> float:
        """Return bytes a second, the best of some tries in the slower direction."""
        return min(self._best(self._send), self._best(self._receive))

    def _best(self, transfer: Any) -> float:
        count, best = _CHUNK, 0.0
        for _ in range(8):
            started = time.perf_counter()
            transfer(count)
            speed = count / (time.perf_counter() - started)
            best = max(best, speed)
            # As much as takes a fraction of a second at this speed; a slow line is not asked for more.
            count = int(min(_MOST, max(_CHUNK, speed * _SECONDS)))
        return best

    def _send(self, count: int) -> None:
        self._ask({"ask": "swallow", "bytes": count}, payload=bytes(count))

    def _receive(self, count: int) -> None:
        with self._open(_TIMEOUT) as connection:
            connection.sendall(self._line({"ask": "pour", "bytes": count}))
            left = count
            while left:
                got = len(connection.recv(min(left, _CHUNK)))
                if not got:
                    raise OSError("the connection ended early")
                left -= got

    def _ask(self, asked: dict[str, Any], *, payload: bytes = b"", timeout: float = _TIMEOUT) -> dict[str, Any]:
        with self._open(timeout) as connection, connection.makefile("rb") as answer:
            connection.sendall(self._line(asked))
            connection.sendall(payload)
            line = answer.readline(4096)
        if not line:
            raise OSError("something else listens there")
        return dict(json.loads(line))

    def _open(self, timeout: float) -> socket.socket:
        return socket.create_connection((self._host, self.peer.port), timeout=timeout)

    def _line(self, asked: dict[str, Any]) -> bytes:
        return (json.dumps(asked | {"token": self._token}) + "\n").encode()


def own_addresses() -> list[str]:
    """List this machine's IPv4 addresses, the loopback left out."""
    if not _FIB_TRIE.is_file():
        return []
    found = re.findall(r"\|-- (\S+)\n\s+/32 host LOCAL", _FIB_TRIE.read_text(encoding="utf-8"))
    return [address for address in dict.fromkeys(found) if not address.startswith("127.")]


def interface_of(address: str) -> str | None:
    """Name the network interface that has an address."""
    import fcntl
    import struct

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                # SIOCGIFADDR
                answer = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def rounds(members: Sequence[int], most: int = 3) -> Iterator[list[tuple[int, int]]]:
    """Pair nodes, each with another in every round (the circle method of tournaments); `most` rounds."""
    circle: list[int | None] = list(members)
    if len(circle) % 2:
        circle.append(None)
    half = len(circle) // 2
    for _ in range(min(most, len(circle) - 1)):
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        yield [(a, b) for a, b in pairs if a is not None and b is not None]
        circle.insert(1, circle.pop())
