"""Clients of `../serve_writes.py`, run by Locust: each puts one chunk after another.

Knows nothing of gradstore, which is not in Locust's environment.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import os
from pathlib import Path

from locust import FastHttpUser, task

BODY = Path(os.environ["BODY"]).read_bytes()
HEADERS = {
    "Authorization": f"Bearer {os.environ['GRADSTORE_WRITE_TOKEN']}",
    "Content-Digest": f"sha-256=:{base64.b64encode(hashlib.sha256(BODY).digest()).decode()}:",
    "Content-Type": "application/octet-stream",
    "If-None-Match": "*",
}
_units = itertools.count()


class Writer(FastHttpUser):
    """A client that waits for nothing but the answers."""

    @task
    def put(self) -> None:
        """Write the chunk of the next unit."""
        path = os.environ["WHERE"] % next(_units)
        self.client.put(f"/v1/files/{path}", data=BODY, headers=HEADERS, name="chunk")
