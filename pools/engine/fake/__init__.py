# SPDX-License-Identifier: Apache-2.0
"""An engine without a model that keeps the same contract, for tests and for load on the gateway.

A product like the rest: `pools.testing` holds it to the contract. `replica` builds it where the config says so.
"""
