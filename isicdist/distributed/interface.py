"""Network interface for gloo between several machines: that of the route to MASTER_ADDR.

gloo binds to the address that the host's own name resolves to, which on Debian and Ubuntu is 127.0.1.1; other machines
cannot connect to that. NCCL looks at the interfaces itself, so that such a cluster works for every other program.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping, MutableMapping

import psutil

VARIABLE = "GLOO_SOCKET_IFNAME"
_OUTSIDE = ("192.0.2.1", "2001:db8::1")  # addresses of documentation: they are routed, but nothing is sent there


def choose_gloo_interface(environ: MutableMapping[str, str], *, world_size: int, local_world_size: int) -> None:
    """Set GLOO_SOCKET_IFNAME for a run on several machines, unless the user has; before a process group is formed.

    Nothing is set for one machine, nor where no interface but the loopback is known: gloo then decides.
    """
    host = environ.get("MASTER_ADDR", "localhost")
    if environ.get(VARIABLE) or world_size <= local_world_size or _is_loopback(host):
        return
    name = routed_interface(host)
    if name:
        environ[VARIABLE] = name


def routed_interface(host: str) -> str | None:
    """Name the interface of the route to `host`; None if it is not known.

    On the machine that has the address `host`, its name may resolve to the loopback: there it is the interface of the
    default route, or the only one that is up.
    """
    addresses = {name: [each.address for each in found] for name, found in psutil.net_if_addrs().items()}
    for target in (host, *_OUTSIDE):
        address = _local_address(target)
        name = interface_of(address, addresses) if address else None
        if name:
            return name
    up = [name for name, status in psutil.net_if_stats().items() if status.isup and "loopback" not in status.flags]
    usable = [name for name in up if any(map(_is_ip, addresses.get(name, [])))]
    return usable[0] if len(usable) == 1 else None


def interface_of(address: str, addresses: Mapping[str, list[str]]) -> str | None:
    """Find the interface that has an IP address; None for a loopback address, which other machines cannot reach.

    `addresses`: those of each interface; an IPv6 address may have its interface after a %.
    """
    wanted = ipaddress.ip_address(_plain(address))
    if wanted.is_loopback:
        return None
    for name, found in addresses.items():
        if any(_is_ip(each) and ipaddress.ip_address(_plain(each)) == wanted for each in found):
            return name
    return None


def _local_address(host: str) -> str | None:
    """Give this machine's address on the route to `host`; connecting UDP sends nothing. None without a route."""
    try:
        resolved = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)
    except OSError:
        return None
    for family, kind, protocol, _, target in resolved:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(target)
                return probe.getsockname()[0]
        except OSError:
            continue
    return None


def _plain(address: str) -> str:
    """Strip the interface of a link-local IPv6 address, as in fe80::1%eth0."""
    return address.partition("%")[0]


def _is_loopback(host: str) -> bool:
    """Recognise the address of one machine; a name is not resolved, since each machine does that differently."""
    return host == "localhost" or (_is_ip(host) and ipaddress.ip_address(_plain(host)).is_loopback)


def _is_ip(address: str) -> bool:
    try:
        ipaddress.ip_address(_plain(address))
    except ValueError:  # a MAC address
        return False
    return True
