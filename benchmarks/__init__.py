# SPDX-License-Identifier: Apache-2.0
"""Measures what disagg costs: `python -m benchmarks`."""
