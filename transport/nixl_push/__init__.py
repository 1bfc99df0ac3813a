# SPDX-License-Identifier: Apache-2.0
"""NIXL in push mode, as its descriptor: the prefill engine writes. Pure.

`transport.transports` alone imports it; what runs inside vLLM is in `transport.in_engine.nixl_push`.
"""
