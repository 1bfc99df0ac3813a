# SPDX-License-Identifier: Apache-2.0
"""Whether one engine works: what it owes, how long it may owe it, and who asks.

`replica` imports it; `disagg.config` takes the limits from here.
"""
