"""The interface that gloo binds to between machines, where a host's own name resolves to its loopback."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest

from isicdist.distributed import interface
from isicdist.distributed.interface import choose_gloo_interface, interface_of, routed_interface

ADDRESSES = {
    "lo": ["127.0.0.1", "::1", "00:00:00:00:00:00"],
    "eth0": ["192.0.2.2", "fd00::2", "fe80::1%eth0", "02:fc:00:00:00:01"],
    "ib0": ["10.0.0.7", "fe80::2%ib0"],
}


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("10.0.0.7", "ib0"),
        ("fd00:0::2", "eth0"),
        ("fe80::2%ib0", "ib0"),
        ("127.0.1.1", None),
        ("::1", None),
        ("10.0.0.8", None),
    ],
)
def test_an_address_belongs_to_one_interface_and_the_loopback_is_none(address, name):
    assert interface_of(address, ADDRESSES) == name


@pytest.mark.parametrize(
    ("environ", "world_size", "name"),
    [
        ({"MASTER_ADDR": "node-a"}, 4, "eth7"),
        ({"MASTER_ADDR": "node-a"}, 2, None),  # one machine
        ({"MASTER_ADDR": "127.0.0.1"}, 4, None),  # one, too, by a launcher that does not set LOCAL_WORLD_SIZE
        ({"MASTER_ADDR": "::1"}, 4, None),
        ({}, 4, None),
        ({"MASTER_ADDR": "node-a", "GLOO_SOCKET_IFNAME": "mine"}, 4, "mine"),
    ],
)
def test_it_is_set_between_machines_unless_the_user_has(monkeypatch, environ, world_size, name):
    monkeypatch.setattr(interface, "routed_interface", lambda host: "eth7")
    choose_gloo_interface(environ, world_size=world_size, local_world_size=2)
    assert environ.get("GLOO_SOCKET_IFNAME") == name


def test_the_host_whose_name_is_its_loopback_takes_the_default_route_or_the_only_interface(monkeypatch):
    """MASTER_ADDR is node-a, and /etc/hosts of node-a says 127.0.1.1."""
    known = {name: [SimpleNamespace(address=each) for each in found] for name, found in ADDRESSES.items()}
    status = {name: SimpleNamespace(isup=name != "ib0", flags="loopback" if name == "lo" else "up") for name in known}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: known)
    monkeypatch.setattr(psutil, "net_if_stats", lambda: status)
    monkeypatch.setattr(interface, "_local_address", {"node-a": "127.0.1.1", "192.0.2.1": "10.0.0.7"}.get)
    assert routed_interface("node-a") == "ib0"
    monkeypatch.setattr(interface, "_local_address", {"node-a": "127.0.1.1"}.get)
    assert routed_interface("node-a") == "eth0"


def test_a_real_route_gives_an_address_of_this_machine_and_no_name_gives_none():
    assert interface._local_address("127.0.0.1") == "127.0.0.1"
    assert interface._local_address("no-such-host.invalid") is None
