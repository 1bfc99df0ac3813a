# SPDX-License-Identifier: Apache-2.0
"""The two legs of one request: prefill on one replica, decode on another, KV between them, and what may fail of it.

Also warms new pairs, which is a hand-off of random tokens. `stream` and `shadow` import it.
"""
