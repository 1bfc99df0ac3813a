# SPDX-License-Identifier: Apache-2.0
"""LMCache's connector with a sink: which hand-offs the shared tier keeps, and what stays pinned meanwhile.

vLLM loads it by module path. It may import `in_engine.protocols`, `in_engine.block_bytes` and `in_engine.patches`.
"""
