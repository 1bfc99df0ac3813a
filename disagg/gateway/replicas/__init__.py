# SPDX-License-Identifier: Apache-2.0
"""Who may serve: the replicas of both pools, what is known against each, and which pairs have moved KV.

`membership` keeps it, `watch` asks the replicas, the rest judges. `handoff`, `ledger`, `stream` and `shadow` import it.
"""
