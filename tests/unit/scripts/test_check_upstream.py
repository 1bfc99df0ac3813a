# SPDX-License-Identifier: Apache-2.0
"""The report on newer releases, over small made-up trees, and the wheel that is read in parts."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import httpx
import pytest

from scripts.check_upstream import BLOCK, Finding, RemoteFile, _unpack, homes_of, judge, report
from transport.upstream.names import Borrowed
from transport.upstream.sources import Sources

OLD = {
    "vllm.kv": """
class Base:
    def load(self, blocks):
        return blocks
    def save(self, blocks):
        return None
    def gone(self):
        pass
    def wait(self):
        pass
class Home:
    pass
class Lost:
    pass
"""
}
NEW = {
    "vllm.kv": """
class Base:
    # Comments are no change.
    def load(self, blocks):
        return blocks
    def save(self, blocks, layer=None):
        return layer
    def wait(self):
        return 1
    def more(self):
        pass
""",
    "vllm.engine.kv": "import os\n\n\nclass Home:\n    pass\n",
}


@pytest.mark.parametrize(
    ("name", "state", "words"),
    [
        (Borrowed("vllm.kv:Base.load", ("a",), "self, blocks"), "same", ""),
        (Borrowed("vllm.kv:Base.save", ("a",)), "changed", "takes (self, blocks, layer)"),
        (Borrowed("vllm.kv:Base.save", ("a",), "self, blocks"), "broken", "takes (self, blocks, layer) and not"),
        (Borrowed("vllm.kv:Base.wait", ("a",)), "changed", "+1 -1 lines in its source"),
        (Borrowed("vllm.kv:Base.wait", ("a",), holds=("pass",)), "broken", "no longer holds 'pass'"),
        (Borrowed("vllm.kv:Base", ("a",)), "changed", "gained more; lost gone"),
        (Borrowed("vllm.kv:Base.gone", ("a",)), "gone", ""),
        (Borrowed("vllm.kv:Lost", ("a",)), "gone", ""),
        (Borrowed("vllm.kv:Home", ("a",)), "moved", "vllm.engine.kv:Home"),
    ],
)
def test_what_has_become_of_a_name(name: Borrowed, state: str, words: str) -> None:
    """Same, changed with our expectations met, broken, moved to another module, or gone."""
    found = Sources(NEW.get).find(name.name)
    homes = () if found is not None or "." in name.name.partition(":")[2] else homes_of(name.name, NEW, NEW.get)
    finding = judge(name, Sources(OLD.get).find(name.name), found, homes)
    assert finding.state == state
    assert finding.words.startswith(words)
    assert bool(words) == bool(finding.words)


def test_the_report_leaves_out_what_is_the_same_and_begins_with_the_work() -> None:
    """One line of counts, then broken and gone names before those that merely changed, each with its users."""
    findings = [
        Finding(Borrowed("vllm.kv:a", ("ours.one",)), "same"),
        Finding(Borrowed("vllm.kv:b", ("ours.one",)), "changed", "+1 -1 lines in its source", "--- \n+++ \n-old\n+new"),
        Finding(Borrowed("vllm.kv:c", ("ours.one", "ours.two")), "gone"),
    ]
    text = report("vllm", "9.9", findings, with_diffs=True).splitlines()
    assert text[0].startswith("vllm 9.9 (tested: 0.")
    assert text[0].endswith("3 names, 1 same, 1 changed, 1 gone")
    assert [line.split() for line in text[1:]] == [
        ["!", "gone", "vllm.kv:c"],
        ["used", "in", "ours.one,", "ours.two"],
        ["~", "changed", "vllm.kv:b"],
        [*"+1 -1 lines in its source; used in ours.one".split()],
        ["|", "-old"],
        ["|", "+new"],
    ]


def _wheel() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as wheel:
        wheel.writestr("vllm/a.py", "A = 1\n")
        wheel.writestr("vllm/compiled.so", bytes(5 * BLOCK))
        wheel.writestr("vllm/kv/b.py", "B = 2\n")
    return data.getvalue()


def test_only_the_sources_of_a_wheel_are_fetched(tmp_path: Path) -> None:
    """What lies between the Python files is not asked for."""
    content = _wheel()

    def answer(request: httpx.Request) -> httpx.Response:
        first, _, last = request.headers["range"].removeprefix("bytes=").partition("-")
        begin, end = (int(first), int(last) + 1) if first else (len(content) - int(last), len(content))
        return httpx.Response(
            206, content=content[begin:end], headers={"content-range": f"bytes {begin}-{end - 1}/{len(content)}"}
        )

    with httpx.Client(transport=httpx.MockTransport(answer)) as client:
        remote = RemoteFile("http://index/vllm.whl", client)
        _unpack(zipfile.ZipFile(remote), tmp_path)
    found = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.*")}
    assert found == {"vllm/a.py": "A = 1\n", "vllm/kv/b.py": "B = 2\n"}
    assert remote.num_fetched < 3 * BLOCK


def test_an_index_that_sends_no_parts_is_told() -> None:
    """The caller then fetches the whole wheel."""
    whole = httpx.MockTransport(lambda request: httpx.Response(200, content=_wheel()))
    with httpx.Client(transport=whole) as client, pytest.raises(OSError, match="status 200"):
        RemoteFile("http://index/vllm.whl", client)
