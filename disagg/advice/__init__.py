# SPDX-License-Identifier: Apache-2.0
"""What can be said of a deployment before it starts: whether a config works, what it amounts to, what does not fit.

Reads files and facts of the machine, asks vLLM's argument classes in a process of its own, and starts nothing else. The
commands, the application and the gateway's start-up use it. It imports settings, the plans of `pools` and the pure
parts of `transport`, and never the gateway, an engine or Ray.
"""
