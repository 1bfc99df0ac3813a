# SPDX-License-Identifier: Apache-2.0
"""NIXL in pull mode, as its descriptor: the decode engine reads. Pure.

`transport.transports` alone imports it; what runs inside vLLM is in `transport.in_engine.nixl`.
"""
