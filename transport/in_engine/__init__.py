# SPDX-License-Identifier: Apache-2.0
"""Code that vLLM loads into its own processes, by module path: connectors, their parts, and patches.

No code of the application imports it. Its connectors do not know each other, but that `nixl_push` answers handshakes by
the listener of `nixl`. `outer` calls them through `protocols`.
"""
