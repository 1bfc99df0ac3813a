# SPDX-License-Identifier: Apache-2.0
"""What an engine is started with, from settings alone: arguments, environment, placement, the model's own files. Pure.

`replica` and `disagg.advice` import it.
"""
