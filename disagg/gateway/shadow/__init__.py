# SPDX-License-Identifier: Apache-2.0
"""The corruption watch: computes a sample of answers again without a hand-off and compares.

`stream` asks it which answers to check.
"""
