# SPDX-License-Identifier: Apache-2.0
"""Engines: the protocol that each keeps, vLLM behind it, and what both say of their hand-offs.

Only modules with `vllm` in their names import vLLM. `replica` builds one of the engines.
"""
