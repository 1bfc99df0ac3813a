# SPDX-License-Identifier: Apache-2.0
"""Who may serve: the replicas of both pools, what is known against each, and which pairs have moved KV.

`membership` keeps all this, `watch` asks the replicas, the other modules judge. `handoff`, `ledger`, `stream` and
`shadow` import this room.
"""
