# SPDX-License-Identifier: Apache-2.0
"""One answer on its way to its client: as ASGI messages or from socket to socket, over the loss of its replica, too.

`app` imports it and nobody else.
"""
