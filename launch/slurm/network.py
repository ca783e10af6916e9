"""Which network leads to another node: asked of the kernel's own routes, not guessed from names."""

from __future__ import annotations

import fcntl
import socket
import struct
import time
from pathlib import Path

from trainer.errors import InputError

_SIOCGIFADDR = 0x8915


def address_towards(host: str) -> str:
    """Return this node's own address on the way to `host`; a name is tried for a while."""
    failure: OSError | None = None
    for pause in (0.0, 1.0, 3.0, 10.0):
        time.sleep(pause)
        try:
            family, kind, protocol, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind, protocol) as probe:
                # Nothing is sent: connecting a datagram socket only asks for the route.
                probe.connect(target)
                return str(probe.getsockname()[0])
        except OSError as error:
            failure = error
    raise InputError(f"{socket.gethostname()}: there is no way to {host} ({failure}); check name resolution and routes")


def interface_of(address: str) -> str:
    """Name the network interface that has an address. Raises `InputError` where none has."""
    for _, name in socket.if_nameindex():
        if address in (_ipv4_of(name), *_ipv6_of(name)):
            return name
    if address.startswith("127."):
        return "lo"
    raise InputError(f"{socket.gethostname()}: no network interface has the address {address}")


def is_free(port: int) -> bool:
    """Tell whether a server could listen on a port of this node."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As torch's store does: a port whose last connections are still fading away counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen(1)
        except OSError:
            return False
    return True


def _ipv4_of(interface: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])


def _ipv6_of(interface: str) -> list[str]:
    try:
        lines = Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    return [
        socket.inet_ntop(socket.AF_INET6, bytes.fromhex(fields[0]))
        for fields in map(str.split, lines)
        if fields[5] == interface
    ]
