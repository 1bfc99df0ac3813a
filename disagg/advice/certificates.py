# SPDX-License-Identifier: Apache-2.0
"""Whether the certificate files of `http_options` can be served. Reads them; the key does not leave this module."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from disagg.advice.problems import Problem

CERTIFICATE, KEY = "ssl_certfile", "ssl_keyfile"
_FILES = (CERTIFICATE, KEY, "ssl_ca_certs")


def serves_tls(http: Mapping[str, Any]) -> bool:
    """Whether Serve's proxy speaks TLS with these `http_options`."""
    return bool(http.get(CERTIFICATE) and http.get(KEY))


def check_certificates(http: Mapping[str, Any], *, haproxy: bool = False) -> list[Problem]:
    """Problems of the `ssl_*` fields: half a pair, files that are not there, and a key of another certificate.

    `haproxy`: whether HAProxy answers in place of Serve's own proxy. Serve 2.60 gives it no certificate, but lets
    gateway replicas speak TLS, so that it reaches none of them.
    """
    given = {name: http[name] for name in _FILES if http.get(name) is not None}
    if given and haproxy:
        message, action = "HAProxy, as Serve runs it, speaks no TLS", "remove it, and end TLS in front of HAProxy"
        return [Problem(f"http_options.{name}", message, "nothing with HAProxy", action) for name in given]
    problems = [
        Problem(f"http_options.{name}", f"is missing, and {other} is set", "both or none", f"set it, or remove {other}")
        for name, other in ((CERTIFICATE, KEY), (KEY, CERTIFICATE))
        if name not in given and other in given
    ]
    for name, file in given.items():
        path = f"http_options.{name}"
        if not isinstance(file, str):
            problems.append(Problem(path, f"{file!r} is no path", "a file in PEM format", "correct it"))
        elif (trouble := _unreadable(Path(file))) is not None:
            problems.append(
                Problem(path, f"cannot read {file!r}: {trouble}", "a file on every node with a proxy", "correct it")
            )
    if problems or not serves_tls(http):
        return problems
    password = http.get("ssl_keyfile_password")
    try:
        # Without a password an encrypted key would be asked for at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            http[CERTIFICATE], http[KEY], password=password if isinstance(password, str) else lambda: ""
        )
    except (ssl.SSLError, OSError) as exc:
        what = (getattr(exc, "reason", None) or str(exc)).lower().replace("_", " ")
        return [
            Problem(
                f"http_options.{KEY}",
                f"certificate and key cannot be served: {what}",
                "PEM files of one certificate and its key",
                "correct the files, or ssl_keyfile_password",
            )
        ]
    return []


def _unreadable(file: Path) -> str | None:
    try:
        with file.open("rb"):
            return None
    except OSError as exc:
        return exc.strerror
