# SPDX-License-Identifier: Apache-2.0
"""Grows the decode pool by one replica and shrinks it again, with the SDK.

DISAGG_URL says where, DISAGG_API_KEY or the file that DISAGG_API_KEY_FILE names (default `.cache/admin-key`) holds
the admin key. The config must say `external_scaler_enabled: true`.
"""

import os
import sys
from pathlib import Path

import disagg


def main() -> None:
    """Show the pools, then scale."""
    url = os.environ.get("DISAGG_URL", "http://127.0.0.1:8000")
    key = os.environ.get("DISAGG_API_KEY")
    if not key:
        key = Path(os.environ.get("DISAGG_API_KEY_FILE", ".cache/admin-key")).read_text().strip()

    with disagg.Client(url, key) as client:
        for pool in client.pools():
            print(f"{pool.name}: {pool.num_routable} of {len(pool.replicas)} replicas get requests")
        decode = client.pool("decode")
        before = decode.status().num_routable
        for size in (before + 1, before):
            operation = decode.scale(size)
            pool = operation.wait(timeout_s=300)
            print(f"decode: {pool.num_routable} replicas after {operation.elapsed_s:.1f} s")


if __name__ == "__main__":
    try:
        main()
    except disagg.DisaggError as exc:
        sys.exit(str(exc))
