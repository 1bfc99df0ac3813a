# SPDX-License-Identifier: Apache-2.0
"""How a replica is spoken to: HTTP/1.1 at the level of bytes, and the requests and answers over it.

The gateway imports it. The replica's server shares its messages.
"""
