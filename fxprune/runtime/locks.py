"""Locks that outlive a fork."""

from __future__ import annotations

import os
import threading

__all__ = ["ForkedLock"]


class ForkedLock:
    """A lock that is open in a forked child, where the thread that held it does not exist.

    Attributes:
        current: the lock of this process.
    """

    current: threading.Lock

    def __init__(self) -> None:
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self.current = threading.Lock()
