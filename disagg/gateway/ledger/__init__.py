# SPDX-License-Identifier: Apache-2.0
"""The books of KV: what each hand-off became, as the engines tell, and which chunks the shared tier holds of it.

`feed` reads the engines' events; all else is pure. `handoff`, `shadow` and `admin` import it.
"""
