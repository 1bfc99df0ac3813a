# SPDX-License-Identifier: Apache-2.0
"""What we borrow from other packages without their promise: how it is described, read, compared, checked and replaced.

The lists themselves are `transport/in_engine/patches/borrowed.py` and `pools/borrowed.py`. The code here names no
foreign package in an import, and every room may import it.
"""
