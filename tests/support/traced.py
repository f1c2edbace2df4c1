"""The memory that Python and NumPy hold while code runs, measured in a process of its own.

`tracemalloc.stop` is not safe while another thread allocates (https://github.com/python/cpython/issues/128679): in a
process with the threads of XLA and pytest-xdist it ends now and then in a segmentation fault.
"""

import json
import os
import subprocess
import sys
import textwrap

_MEASURE = """
import json, os, sys, tracemalloc
import embax.vectors, jax  # before, since tracing makes imports slow

def peak(run):
    "Bytes at the highest point of a call, beyond those before it."
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    run()
    return tracemalloc.get_traced_memory()[1] - before

def held(run):
    "Bytes that the result of a call holds."
    before = tracemalloc.get_traced_memory()[0]
    result = run()
    return tracemalloc.get_traced_memory()[0] - before

tracemalloc.start()
{code}
print(json.dumps(found), flush=True)
os._exit(0)  # without the end of tracing
"""


def traced(code, *arguments):
    """Run code that measures by `peak(run)` or `held(run)`; returns what it calls `found`.

    The code finds the arguments, strings, in `sys.argv[1:]`.
    """
    ran = subprocess.run(
        [sys.executable, "-c", _MEASURE.format(code=textwrap.dedent(code)), *map(str, arguments)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])
