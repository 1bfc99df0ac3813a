# SPDX-License-Identifier: Apache-2.0
"""One chat answer with the OpenAI client. Needs `pip install openai`; DISAGG_URL says where."""

import os

from openai import OpenAI


def main() -> None:
    """Ask the first model that the server has."""
    url = os.environ.get("DISAGG_URL", "http://127.0.0.1:8000")
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Name three colours."}], max_tokens=32
    )
    print(answer.choices[0].message.content)
    assert answer.usage is not None
    print(f"{answer.usage.prompt_tokens} prompt tokens, {answer.usage.completion_tokens} generated")


if __name__ == "__main__":
    main()
