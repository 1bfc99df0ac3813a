# SPDX-License-Identifier: Apache-2.0
"""vLLM imports this module in the workers of a machine without an accelerator, and importing it applies the patches.

`pools.plan.launch` names it as `worker_extension_cls` for `platform: cpu` and never otherwise.
"""

from __future__ import annotations

from transport.in_engine.patches.borrowed import BORROWED
from transport.in_engine.patches.replaced import REPLACED
from transport.upstream.guard import require
from transport.upstream.replacing import apply

require(BORROWED, "transport.in_engine.patches.host_platform")
apply(REPLACED, "worker", "cpu")


class HostWorkerExtension:
    """Named as `worker_extension_cls`; vLLM adds it to the bases of its worker class. It adds nothing."""
