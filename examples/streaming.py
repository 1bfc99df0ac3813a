# SPDX-License-Identifier: Apache-2.0
"""A streamed chat answer, and which replicas gave it. Needs `pip install openai`; DISAGG_URL says where."""

import os
import sys
import time

from openai import OpenAI


def main() -> None:
    """Print tokens as they come, then the replicas and the timing."""
    url = os.environ.get("DISAGG_URL", "http://127.0.0.1:8000")
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    started = time.monotonic()
    first: float | None = None
    reason = None
    with client.chat.completions.with_streaming_response.create(
        model=model,
        messages=[{"role": "user", "content": "Tell me a short story."}],
        max_tokens=64,
        stream=True,
    ) as response:
        for chunk in response.parse():
            for choice in chunk.choices:
                reason = choice.finish_reason or reason
                if choice.delta.content:
                    first = first or time.monotonic()
                    print(choice.delta.content, end="", flush=True)
        headers = response.headers
    print()
    if reason is None:
        sys.exit("the stream ended early")
    print(f"prefill on {headers['x-disagg-prefill']}, decode on {headers['x-disagg-decode']}")
    if first is not None:
        print(f"first text after {first - started:.3f} s, all after {time.monotonic() - started:.3f} s")


if __name__ == "__main__":
    main()
