# SPDX-License-Identifier: Apache-2.0
"""The published contract of an engine as checks over HTTP, which real and fake engines pass alike.

For tests, here and elsewhere; no other room imports it.
"""
