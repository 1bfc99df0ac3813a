# SPDX-License-Identifier: Apache-2.0
"""Judges values of vLLM's arguments by vLLM's own classes and registries, without an engine and without a device.

A process of its own, `python -m pools.judge`, because importing vLLM takes seconds. `disagg.advice.values` starts it,
and no other room imports it. What is asked and answered is in `pools.plan.verdicts`.
"""
