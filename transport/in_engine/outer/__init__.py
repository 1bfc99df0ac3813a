# SPDX-License-Identifier: Apache-2.0
"""The outer connector of every engine: vLLM's MultiConnector with a ledger of hand-offs.

vLLM loads it by module path. It imports none of the connectors that it holds, and calls them through
`in_engine.protocols`.
"""
