# SPDX-License-Identifier: Apache-2.0
"""`disagg serve --model`: the config with another model, and a hub that does not have it or is not there."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import huggingface_hub.constants
import pytest
import yaml

from disagg.cli import hub, other_model

QUICKSTART = Path(__file__).resolve().parents[4] / "configs" / "quickstart.yaml"


def test_the_model_is_exchanged_and_nothing_else(tmp_path: Path) -> None:
    """Source and name; a directory is named by its last part."""
    checkpoint = tmp_path / "my-model"
    checkpoint.mkdir()
    before = yaml.safe_load(QUICKSTART.read_text())
    for given, name in (("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"), (str(checkpoint), "my-model")):
        after = yaml.safe_load(other_model.written(QUICKSTART, given, tmp_path).read_text())
        model = after["applications"][0]["args"]["model"]
        assert (model["source"], model["id"]) == (given, name)
        model |= {key: before["applications"][0]["args"]["model"][key] for key in ("source", "id")}
        assert after == before


@pytest.mark.parametrize("text", ["applications: [", "7", "applications: []", "applications: [{args: 3}]", None])
def test_a_file_that_has_no_place_for_it(text: str | None, tmp_path: Path) -> None:
    """It is left to the check, which says what is wrong."""
    config = tmp_path / "config.yaml"
    if text is not None:
        config.write_text(text)
    assert other_model.written(config, "a/b", tmp_path / "nowhere") == config


@pytest.fixture
def hub_url(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A hub that has `there/model` and `bare/model`, and keeps `gated/model` for some."""

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            told = {"there": (200, ""), "bare": (404, "EntryNotFound"), "gated": (403, "GatedRepo"), "busy": (500, "")}
            status, error = told.get(self.path.split("/")[1], (401, "RepoNotFound"))
            self.send_response(status)
            if error:
                self.send_header("X-Error-Code", error)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("there/model", None),
        ("bare/model", None),
        ("other/model", "shows no model 'other/model'"),
        ("gated/model", "accepted its terms: set HF_TOKEN"),
        ("busy/model", "answered 500"),
    ],
)
def test_what_the_hub_says(source: str, words: str | None, hub_url: str) -> None:
    """In one line that says what to do."""
    told = hub.trouble(source, {"HF_ENDPOINT": hub_url})
    assert told is None if words is None else words in (told or "")


def test_what_engines_would_ask_for(hub_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The revision, the token and the variables of the config, whose cache may have it."""
    asked: list[tuple[str, str | None]] = []

    def head(url: str, *, headers: dict[str, str], **_: object) -> httpx.Response:
        asked.append((url, headers.get("authorization")))
        return httpx.Response(200)

    with monkeypatch.context() as patch:
        patch.setattr(httpx, "head", head)
        assert hub.trouble("a/b", {"HF_ENDPOINT": "http://h", "HF_TOKEN": "t"}, revision="v1") is None
        assert hub.trouble("a/b", {"HF_ENDPOINT": "http://h", "HF_TOKEN": "t"}, token="own") is None
    assert asked == [
        ("http://h/a/b/resolve/v1/config.json", "Bearer t"),
        ("http://h/a/b/resolve/main/config.json", "Bearer own"),
    ]
    kept = tmp_path / "home" / "hub" / "models--a--b" / "snapshots" / ("c" * 40)
    kept.mkdir(parents=True)
    (kept / "config.json").write_text("{}")
    there = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:1"}
    assert hub.trouble("a/b", there, revision="c" * 40) is None
    assert "HF_HUB_OFFLINE forbids" in (hub.trouble("a/b", there, revision="d" * 40) or "")


@pytest.mark.parametrize(("proxy", "words"), [("socks5://127.0.0.1:9", "socksio"), ("foo://x", "cannot reach the hub")])
def test_proxies_that_cannot_be_used(proxy: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One line, whatever the library raises."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("ALL_PROXY", proxy)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert words in (hub.trouble("a/b", {"HF_ENDPOINT": "http://hub.test"}, patience_s=2) or "")


def test_a_hub_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens, nobody answers, or nobody may be asked: told soon. What is on this machine is not asked for."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert "cannot reach the hub http://127.0.0.1:1" in (
        hub.trouble("a/b", {"HF_ENDPOINT": "http://127.0.0.1:1"}) or ""
    )
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert "did not answer within 0.2 s" in (hub.trouble("a/b", {"HF_ENDPOINT": url}, patience_s=0.2) or "")
        assert time.monotonic() - started < 5
    assert hub.trouble(str(tmp_path), {"HF_ENDPOINT": "http://127.0.0.1:1"}) is None
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids" in (hub.trouble("a/b", {}) or "")
