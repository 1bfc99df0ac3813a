# SPDX-License-Identifier: Apache-2.0
"""vLLM's MooncakeConnector, its two sides and its ports, bounded and told when a peer is gone.

vLLM loads it by module path. It may import `in_engine.protocols` and `in_engine.patches`.
"""
