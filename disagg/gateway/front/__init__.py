# SPDX-License-Identifier: Apache-2.0
"""From a client's bytes to a checked request: keys, tenants, limits, fields, chat template and tokeniser.

Errors and the OpenAPI document are here, too. It knows no replica. All other rooms of the gateway may import it.
"""
