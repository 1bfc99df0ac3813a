# SPDX-License-Identifier: Apache-2.0
"""Which replicas serve a request: frozen views in, a decision out. Pure.

The gateway imports it. It imports neither the gateway nor Ray; its one adapter to Serve, `serve`, reports replicas.
"""
