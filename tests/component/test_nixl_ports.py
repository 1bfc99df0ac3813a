# SPDX-License-Identifier: Apache-2.0
"""NIXL agents exchange data without the ports of their threads, and what comes to the others does not pile up."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Mapping
from multiprocessing.connection import Connection

import pytest

from tests.support import preloaded
from tests.support.garbage import silence, throw_all
from tests.support.stack import wait_until
from transport.in_engine.patches.nixl_ports import without_name
from transport.in_engine.patches.ports import ListeningSocket

START_S = 300.0
"""An import of vLLM; some seconds on a machine that does nothing else."""
NUM_BLOCKS, BLOCK = 3000, 4096
"""More than the 1,024 from which NIXL splits a transfer over its threads."""


def agent(name: str, peer: Connection, report: Connection, env: Mapping[str, str]) -> None:
    """An agent like vLLM's, without the ports of its threads: `reader` reads all of `owner`'s memory, twice."""
    os.environ.update(env)
    import torch
    from vllm.distributed.nixl_utils import NixlWrapper, nixl_agent_config

    from transport.in_engine.patches.nixl_ports import close_unnamed
    from transport.in_engine.patches.ports import listening

    before = listening()
    mine = NixlWrapper(name, nixl_agent_config(num_threads=4, capture_telemetry=True))
    num_ports = len(listening().keys() - before.keys())
    # What another thread might open meanwhile.
    with socket.create_server(("127.0.0.1", 0)) as other:
        num_closed = close_unnamed(before, mine.get_agent_metadata())
        assert other.fileno() in listening()
    assert 0 < num_closed < num_ports
    pattern = torch.arange(NUM_BLOCKS * BLOCK // 8, dtype=torch.int64)
    memory = pattern.clone() if name == "owner" else torch.zeros_like(pattern)
    region = [(memory.data_ptr(), NUM_BLOCKS * BLOCK, 0, "")]
    mine.register_memory(mine.get_reg_descs(region, "DRAM"), backends=["UCX"])
    peer.send((mine.get_agent_metadata(), memory.data_ptr()))
    metadata, address = peer.recv()
    other = mine.add_remote_agent(metadata)
    if name == "reader":
        blocks = list(range(NUM_BLOCKS))
        here, there = (
            mine.prep_xfer_dlist(who, mine.get_xfer_descs([(at + i * BLOCK, BLOCK, 0) for i in blocks], "DRAM"))
            for who, at in (("NIXL_INIT_AGENT", memory.data_ptr()), (other, address))
        )
        for _ in range(2):
            memory.zero_()
            transfer = mine.make_prepped_xfer("READ", here, blocks, there, blocks, notif_msg=b"read")
            mine.transfer(transfer)
            wait_until(lambda handle=transfer: mine.check_xfer_state(handle) == "DONE", 60, "the blocks are read")
            assert torch.equal(memory, pattern)
        peer.send(None)
    else:
        report.send([(port.host, port.port) for fd, port in listening().items() if fd not in before])
        num_descriptors = len(os.listdir("/proc/self/fd"))
        while not peer.poll(0.01):
            mine.get_new_notifs()
        report.recv()

        def given_back() -> bool:
            # The agent gives them back while it is polled, as an engine's worker does at every step.
            mine.get_new_notifs()
            # A peer, or a thread of the agent, may have a few more than before.
            return len(os.listdir("/proc/self/fd")) <= num_descriptors + 10

        wait_until(given_back, 20, "descriptors are given back")
    report.send("done")
    report.recv()


@pytest.mark.parametrize("tls", [None, "tcp,self"])
def test_agents_need_only_the_ports_that_peers_are_told(tls: str | None) -> None:
    """Over shared memory and over TCP alone, while garbage and silence come in at the ports that are left."""
    env = {} if tls is None else {"UCX_TLS": tls}
    context = preloaded.context()
    ends = context.Pipe()
    reports = {name: context.Pipe() for name in ("owner", "reader")}
    agents = [
        context.Process(target=agent, args=(name, end, reports[name][1], env), daemon=True)
        for name, end in zip(reports, ends, strict=True)
    ]
    for process in agents:
        process.start()
    owner, reader = (reports[name][0] for name in reports)
    assert owner.poll(START_S)
    for host, port in owner.recv():
        throw_all(host, port)
        with silence(host, port, 200) as connections:
            assert len(connections) == 200
    assert reader.poll(START_S) and reader.recv() == "done"
    owner.send("the garbage is over")
    assert owner.poll(START_S) and owner.recv() == "done"
    for report in (owner, reader):
        report.send("end")
    for process in agents:
        process.join(30)
        process.kill()


def test_ports_that_are_named_are_kept() -> None:
    """As are those made by another library; and all of them when none is named, as another version might do it."""
    metadata = b"\x01" + (40000).to_bytes(2, "big") + b"\x02" + (40001).to_bytes(2, "big")

    def ucx(port: int) -> ListeningSocket:
        return ListeningSocket(socket.AF_INET, "127.0.0.1", port, (0, os.O_RDWR | os.O_NONBLOCK, 0))

    python = ListeningSocket(socket.AF_INET, "127.0.0.1", 40003, (fcntl.FD_CLOEXEC, os.O_RDWR, 1))
    assert without_name({3: ucx(40000), 4: ucx(40001), 5: ucx(40002), 6: python}, metadata) == {5}
    assert without_name({5: ucx(40002), 6: python}, metadata) == set()
    assert without_name({}, metadata) == set()
