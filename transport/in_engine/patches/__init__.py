# SPDX-License-Identifier: Apache-2.0
"""What is replaced in other packages inside an engine's processes, each with its reason and its way out.

The plugin, the worker extension in `worker` and the connectors apply the replacements.
"""
