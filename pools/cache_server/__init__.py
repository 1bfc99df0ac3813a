# SPDX-License-Identifier: Apache-2.0
"""The managed LMCache server of a node: one supervised child process, and the Ray actor around it.

Replicas hold it while they use it. `replica` and `health` import it.
"""
