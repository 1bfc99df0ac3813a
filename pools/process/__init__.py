# SPDX-License-Identifier: Apache-2.0
"""Processes of this machine: descendants, ports, descriptors, shared memory, log handlers.

Knows no engine. Every room of `pools` and the commands may import it.
"""
