import subprocess
import sys

import pytest

# Page faults of a fresh process that allocates and frees 64 MB twenty times over.
CODE = """
import resource, sys, torch
from dualrefnet.training.loop import keep_freed_memory
told = keep_freed_memory() if sys.argv[1] == "keep" else None
for _ in range(20):  # Until the heap has grown.
    torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
assert told is not False
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is what is told")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    faults = {}
    for mode in ("keep", "default"):
        done = subprocess.run([sys.executable, "-c", CODE, mode], capture_output=True, text=True, check=True)
        faults[mode] = int(done.stdout)
    assert faults["keep"] < 0.1 * faults["default"]
