# SPDX-License-Identifier: Apache-2.0
"""Process groups of torch keep working without the ports that they were made with."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.support import preloaded
from transport.in_engine.patches.gloo_listeners import published_in
from transport.in_engine.patches.ports import ListeningSocket


def member(rank: int, size: int, path: str) -> None:
    """One rank: makes two groups, closes their ports beside a port of another owner, and adds up the ranks."""
    import torch
    import torch.distributed as dist

    from transport.in_engine.patches.gloo_listeners import close_group_ports
    from transport.in_engine.patches.ports import listening

    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
    groups = [dist.group.WORLD, dist.new_group(list(range(size)), backend="gloo")]
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert len(listening()) == 1 + len(groups)
        assert close_group_ports() == len(groups)
        assert close_group_ports() == 0
        assert listening().keys() == {other.fileno()}
    for group in groups:
        total = torch.tensor([rank])
        dist.all_reduce(total, group=group)
        assert total.item() == sum(range(size))
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [1, 2])
def test_groups_need_no_port_once_they_are_made(size: int, tmp_path: Path) -> None:
    """Ranks of two groups add up their numbers while none of them listens; the port of somebody else stays open."""
    context = preloaded.context()
    ranks = [context.Process(target=member, args=(rank, size, str(tmp_path / "store"))) for rank in range(size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0] * size


def test_without_it_they_listen(tmp_path: Path) -> None:
    """The ports are there otherwise, so that the test above can fail."""
    context = preloaded.context()
    rank = context.Process(target=listener, args=(str(tmp_path / "store"),))
    rank.start()
    rank.join(120)
    assert rank.exitcode == 0


def listener(path: str) -> None:
    import torch.distributed as dist

    from transport.in_engine.patches.ports import listening

    dist.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
    assert listening()
    dist.destroy_process_group()


def test_a_port_is_closed_by_its_whole_address() -> None:
    """The same port at another address, another port, and an IPv6 address that is not published are left alone."""
    made_as = (0, 2, 1)
    published = [b"\x02" + bytes(7) + bytes.fromhex("0200 1f90 7f000001") + bytes(8)]
    published.append(bytes.fromhex("0a00 1f91 00000000") + bytes(15) + b"\x01")
    ports = {
        3: ListeningSocket(socket.AF_INET, "127.0.0.1", 8080, made_as),
        4: ListeningSocket(socket.AF_INET, "127.0.0.2", 8080, made_as),
        5: ListeningSocket(socket.AF_INET, "127.0.0.1", 8081, made_as),
        6: ListeningSocket(socket.AF_INET6, "::1", 8081, made_as),
        7: ListeningSocket(socket.AF_INET6, "::2", 8081, made_as),
    }
    assert published_in(ports, published) == {3, 6}
    assert published_in(ports, []) == set()
