# SPDX-License-Identifier: Apache-2.0
"""How KV moves: settings of connectors and tiers, and what an engine is told about them. Pure; no Ray.

`pools` and `disagg` may import it; it imports neither. `in_engine` is the part that runs inside engines.
"""
