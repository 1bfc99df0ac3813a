# SPDX-License-Identifier: Apache-2.0
"""Sends a prompt that may not be stored in the shared cache, then asks the ledger what became of its KV.

DISAGG_URL says where, DISAGG_API_KEY or the file that DISAGG_API_KEY_FILE names (default `.cache/admin-key`) holds
the admin key, which the ledger asks for. `disagg handoffs` shows the same.
"""

import os
import sys
import time
from pathlib import Path

import httpx

import disagg


def main() -> None:
    """One completion, its record, and the books."""
    url = os.environ.get("DISAGG_URL", "http://127.0.0.1:8000")
    key = os.environ.get("DISAGG_API_KEY")
    if not key:
        key = Path(os.environ.get("DISAGG_API_KEY_FILE", ".cache/admin-key")).read_text().strip()

    body = {"model": "tiny", "prompt": "a private prompt " * 30, "max_tokens": 4, "disagg_store": "never"}
    request_id = f"example-{time.time_ns()}"
    answer = httpx.post(f"{url}/v1/completions", json=body, headers={"x-request-id": request_id}, timeout=60)
    answer.raise_for_status()

    with disagg.Client(url, key) as client:
        books = client.handoffs(request_id=request_id)
        while not books.records or books.records[0].outcome == "open":
            time.sleep(0.1)  # engines report what became of KV a moment later
            books = client.handoffs(request_id=request_id)
    record = books.records[0]
    print(f"{record.tokens} tokens, {record.bytes} bytes: {record.outcome}, {record.stored_tokens} tokens stored")
    print(f"all in all: {books.totals['produced'].count} produced, balanced: {books.balanced}")


if __name__ == "__main__":
    try:
        main()
    except disagg.DisaggError as exc:
        sys.exit(str(exc))
