# SPDX-License-Identifier: Apache-2.0
"""`Client` and `AsyncClient`: pools, sizes and hand-offs of a running application over its admin API.

Needs httpx and pydantic. The commands and users import it; it imports `disagg.errors`.
"""
