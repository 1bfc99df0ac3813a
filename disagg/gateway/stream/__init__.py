# SPDX-License-Identifier: Apache-2.0
"""One answer on its way to its client, as ASGI messages or from socket to socket, also when its replica is lost.

Only `app`, `routes` and `deployment` import it.
"""
