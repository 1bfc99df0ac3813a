# SPDX-License-Identifier: Apache-2.0
"""vLLM's NixlConnector, extended: it says how each hold ended, and ends a hold on request.

vLLM loads it by module path. It may import `in_engine.protocols` and `in_engine.patches`.
"""
