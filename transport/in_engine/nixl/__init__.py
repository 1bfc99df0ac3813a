# SPDX-License-Identifier: Apache-2.0
"""vLLM's NixlConnector, which says how each hold ended and ends one on request.

vLLM loads it by module path. It may import `in_engine.protocols` and `in_engine.patches`.
"""
