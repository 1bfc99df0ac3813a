# SPDX-License-Identifier: Apache-2.0
"""Certificates of a Serve config: what cannot be served is found before the start, and addresses say https."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from disagg.advice.certificates import check_certificates
from disagg.advice.check import check_file
from disagg.advice.machine import Machine
from disagg.cli.serving import curl
from tests.support.certificates import Certificate, self_signed

QUICKSTART = Path(__file__).resolve().parents[4] / "configs" / "quickstart.yaml"


@pytest.fixture
def certificate(tmp_path: Path) -> Certificate:
    return self_signed(tmp_path)


def options(certificate: Certificate, **changes: Any) -> dict[str, Any]:
    given = {"ssl_certfile": str(certificate.cert), "ssl_keyfile": str(certificate.key), **changes}
    return {name: value for name, value in given.items() if value is not None}


def test_a_pair_that_can_be_served(certificate: Certificate, tmp_path: Path) -> None:
    """Also with an encrypted key and its password, and none at all."""
    locked = self_signed(tmp_path, "locked", password="secret")
    assert check_certificates({}) == check_certificates(options(certificate)) == []
    assert check_certificates(options(locked, ssl_keyfile_password="secret")) == []


@pytest.mark.parametrize(
    ("changes", "path", "words"),
    [
        ({"ssl_keyfile": None}, "ssl_keyfile", "is missing"),
        ({"ssl_certfile": None}, "ssl_certfile", "is missing"),
        ({"ssl_certfile": "nowhere.pem"}, "ssl_certfile", "No such file"),
        ({"ssl_keyfile": "."}, "ssl_keyfile", "Is a directory"),
        ({"ssl_ca_certs": "nowhere.pem"}, "ssl_ca_certs", "No such file"),
        ({"ssl_keyfile": 7}, "ssl_keyfile", "is no path"),
    ],
)
def test_files_that_cannot_be_read(changes: Mapping[str, Any], path: str, words: str, certificate: Certificate) -> None:
    """With the field's path."""
    problems = check_certificates(options(certificate, **changes))
    assert any(problem.path == f"http_options.{path}" and words in problem.message for problem in problems)


def test_haproxy_speaks_no_tls(certificate: Certificate) -> None:
    """Whatever the files are, because the gateways would speak TLS and HAProxy would not."""
    problems = check_certificates(options(certificate), haproxy=True)
    assert [problem.path for problem in problems] == ["http_options.ssl_certfile", "http_options.ssl_keyfile"]
    assert check_certificates({}, haproxy=True) == []


def test_haproxy_is_seen_in_the_file(certificate: Certificate, tmp_path: Path) -> None:
    """By the environment that the file gives to Serve's controller."""
    file = tmp_path / "haproxy.yaml"
    config = yaml.safe_load(QUICKSTART.with_name("quickstart-haproxy.yaml").read_text())
    config["http_options"] = {**config.get("http_options", {}), **options(certificate)}
    file.write_text(yaml.safe_dump(config))
    problems = check_file(file, base_dir=tmp_path, machine=None, require_model=False, ask=None).problems
    assert {"http_options.ssl_certfile", "http_options.ssl_keyfile"} <= {problem.path for problem in problems}


def test_pairs_that_do_not_fit(certificate: Certificate, tmp_path: Path) -> None:
    """Another certificate's key, a wrong password or none, and a file that is no certificate."""
    other, locked = self_signed(tmp_path, "other"), self_signed(tmp_path, "locked", password="secret")
    text = tmp_path / "text.pem"
    text.write_text("nothing")
    for wrong in (
        options(certificate, ssl_keyfile=str(other.key)),
        options(locked),
        options(locked, ssl_keyfile_password="wrong"),
        options(certificate, ssl_certfile=str(text)),
    ):
        [problem] = check_certificates(wrong)
        assert problem.path == "http_options.ssl_keyfile" and "cannot be served" in problem.message


@pytest.mark.parametrize(
    ("http", "url"),
    [
        ({"host": "127.0.0.1"}, "http://127.0.0.1:8000"),
        ({"host": "0.0.0.0", "port": 9}, "http://127.0.0.1:9"),
        ({"host": "::"}, "http://[::1]:8000"),
        ({"host": "fe80::1"}, "http://[fe80::1]:8000"),
        ({"host": "localhost", "tls": True}, "https://localhost:8000"),
    ],
)
def test_the_url_is_one_to_use(http: dict[str, Any], url: str, certificate: Certificate, tmp_path: Path) -> None:
    """The scheme that is served, and brackets around IPv6; the printed command trusts the server's certificate."""
    data = yaml.safe_load(QUICKSTART.read_text())
    tls = http.pop("tls", False)
    data["http_options"] = {**http, **(options(certificate) if tls else {})}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(data))
    machine = Machine(num_cpus=64, memory_bytes=2**40, port_trouble=lambda host, port: None)
    report = check_file(file, machine=machine, base_dir=tmp_path, ask=None)
    assert (report.url, report.certificate) == (url, str(certificate.cert) if tls else None)
    command = curl(url, "tiny", certificate=report.certificate)
    assert (f"--cacert {certificate.cert} " in command) is tls
