# SPDX-License-Identifier: Apache-2.0
"""Engines: the protocol that each keeps, vLLM behind it, and what both say of their hand-offs.

`vllm_engine` and `_vllm_compat` are the only modules here that import vLLM. `replica` builds one of the engines.
"""
