# SPDX-License-Identifier: Apache-2.0
"""One replica of a pool as Serve runs it: what it is built from, its private HTTP, its drain and its end.

`disagg.app` imports the deployments.
"""
