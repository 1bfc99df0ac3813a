# SPDX-License-Identifier: Apache-2.0
"""NixlPushConnector as engines load it: vLLM's, with hand-offs that end on both sides, whatever fails.

vLLM alone imports it, by name. It shares the listener of `transport.in_engine.nixl` and knows no other connector.
"""
