"""Each attempt of a launcher on one machine has keys of its own in the launcher's store."""

from __future__ import annotations

from datetime import timedelta

import pytest
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import rendezvous

from isicdist.distributed.attempts import init_method


@pytest.mark.parametrize(
    ("restarts", "local_world_size", "chosen"),
    [("0", "2", None), ("1", "2", "isicdist-attempt://1"), ("3", "2", "isicdist-attempt://3"), ("1", "1", None)],
)
def test_only_a_restart_on_one_machine_has_a_rendezvous_of_its_own(restarts, local_world_size, chosen):
    env = {"TORCHELASTIC_RESTART_COUNT": restarts, "LOCAL_WORLD_SIZE": local_world_size, "WORLD_SIZE": "2"}
    assert init_method(env) == chosen
    assert init_method({}) is None


def test_an_attempt_does_not_see_the_keys_of_the_one_before(monkeypatch):
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port), "RANK": "1", "WORLD_SIZE": "2"}
    for name, value in {**env, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    stores = [next(rendezvous(url, timeout=timedelta(seconds=5)))[0] for url in ("env://", "isicdist-attempt://1")]
    stores[0].set("address of rank 0", "gone")
    assert stores[0].check(["address of rank 0"])
    assert not stores[1].check(["address of rank 0"])
