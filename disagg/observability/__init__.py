# SPDX-License-Identifier: Apache-2.0
"""What the gateway counts, and the engines' own counts with the names of pool and replica.

Every room of the gateway may import it. It imports `disagg.errors` and nothing else of this project.
"""
