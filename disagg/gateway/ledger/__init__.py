# SPDX-License-Identifier: Apache-2.0
"""The books of KV: what each hand-off became, as the engines report, and which of its chunks the shared tier holds.

`feed` reads the engines' events; all else is pure. `handoff`, `shadow`, `admin` and `routes` import this room.
"""
