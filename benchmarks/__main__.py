"""All of them, one after another: `make bench`."""

import subprocess
import sys

for name in ("drain", "latency"):
    print(f"## {name}\n", flush=True)
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)  # noqa: S603  (our own modules)
    print(flush=True)
