# SPDX-License-Identifier: Apache-2.0
"""The gateway replica: `app` puts the rooms together, `deployment` runs it in Serve, `admin` answers its operators.

`front` takes requests in, `routing` (beside this package) decides, `handoff` runs the two legs, `stream` sends answers.
`replicas` knows who may serve, `ledger` keeps the books of KV, `shadow` computes answers again. `disagg/app.py` and
`disagg/pages/metrics.py` import this package. The order in which its rooms may import each other is a contract in
`pyproject.toml`.
"""
