# SPDX-License-Identifier: Apache-2.0
"""Replicas that own an engine, and all that it takes to start, serve, watch and end one.

`config` and `errors` are for everybody. `disagg` imports this package; it imports `transport`.
"""
