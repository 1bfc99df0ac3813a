# SPDX-License-Identifier: Apache-2.0
"""vLLM's tiers in host memory and on disk where there is no accelerator: the same specs, copied by the host.

vLLM loads `specs` by module path. It imports no other part of `in_engine`.
"""
