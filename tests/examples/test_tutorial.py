"""The cluster tutorial, as `make demo` runs it."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

DEMO = Path(__file__).parents[2] / "examples" / "tutorial" / "demo.py"


async def test_demo_runs_end_to_end() -> None:
    """Three kinds of task on a six-node cluster; a slot moves under the load; nothing is lost, doubled or refused."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(DEMO), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said, _ = await process.communicate()
    text = said.decode()
    assert process.returncode == 0, text
    assert "enqueued 6000, worked 6000, worked twice 0, errors at callers 0" in text
    assert text.count("keys were moved under the load") == 4
    slots = dict(re.findall(r"^(images|notifications|webhooks) +(\d+) ", text, re.MULTILINE))
    assert slots == {"images": "9450", "notifications": "16340", "webhooks": "4418"}
    nodes = re.findall(r"[0-9a-f]{40} 127\.0\.0\.1:\d+, [0-9a-f]{40} 127\.0\.0\.1:\d+", text)
    assert len(nodes) == 3  # a master and its replica for each queue
