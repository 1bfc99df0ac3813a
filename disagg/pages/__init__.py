# SPDX-License-Identifier: Apache-2.0
"""Writes the generated pages of `docs/` from the settings, the metrics and the gateway's tables.

Nobody imports it but its tests; `python -m disagg.pages.generate` runs it.
"""
