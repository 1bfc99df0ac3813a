# SPDX-License-Identifier: Apache-2.0
"""Process groups of torch keep working without the ports that they were made with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import preloaded


def member(rank: int, size: int, path: str) -> None:
    """One rank: makes two groups, looks for open ports, and adds up the ranks over each group."""
    import torch
    import torch.distributed as dist

    from transport.in_engine.patches.gloo_listeners import close_after_connecting, listening

    close_after_connecting()
    close_after_connecting()
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
    for group in (dist.group.WORLD, dist.new_group(list(range(size)), backend="gloo")):
        total = torch.tensor([rank])
        dist.all_reduce(total, group=group)
        assert total.item() == sum(range(size))
    assert not listening()
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [1, 2])
def test_groups_need_no_port_once_they_are_made(size: int, tmp_path: Path) -> None:
    """Ranks of one group and of a later one add up their numbers while none of their processes listens."""
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

    from transport.in_engine.patches.gloo_listeners import listening

    dist.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
    assert listening()
    dist.destroy_process_group()
