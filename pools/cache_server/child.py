# SPDX-License-Identifier: Apache-2.0
"""Runs a command that cannot outlive the thread that started it: `python -I -S <this file> <parent pid> <command>`.

When the parent ends, whatever ends it, the kernel sends the death signal to the program that has replaced this one by
`execv`. The signal is SIGKILL, because a server that hangs would not react to another one. This module is started as a
file, so it imports the standard library only. This works on Linux; elsewhere the command simply runs.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # The parent may have ended before the kernel was told.
        if os.getppid() != int(sys.argv[1]):
            sys.exit(1)
    os.execv(sys.argv[2], sys.argv[2:])
