# SPDX-License-Identifier: Apache-2.0
"""The `disagg` command, one module a sub-command, each a thin shell over the SDK, `advice` or `serve run`.

The only room beside `disagg/app.py` that nobody imports.
"""
