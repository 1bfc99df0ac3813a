# SPDX-License-Identifier: Apache-2.0
"""Code that vLLM loads into its own processes, by module path: connectors, their parts, and patches.

Nobody outside imports it. Its connectors do not know each other; `outer` speaks to them by `protocols`.
"""
