# SPDX-License-Identifier: Apache-2.0
"""vLLM's tiers in host memory and on disk, for a machine without an accelerator: vLLM's specs, but the host copies.

vLLM loads `specs` by module path. Of the rest of `in_engine`, this room imports `patches` alone.
"""
