# SPDX-License-Identifier: Apache-2.0
"""vLLM's MooncakeConnector, extended: its ports have bounds, and each hand-off gets an answer even if a peer is gone.

vLLM loads it by module path. It may import `in_engine.protocols` and `in_engine.patches`.
"""
