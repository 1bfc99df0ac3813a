# SPDX-License-Identifier: Apache-2.0
"""Every Python process with this folder on its path says on SIGUSR2 what it has replaced: `tests.support.replaced`."""

import signal
from types import FrameType


def _tell(number: int, frame: FrameType | None) -> None:
    from tests.support.replaced import write

    write()


signal.signal(signal.SIGUSR2, _tell)
