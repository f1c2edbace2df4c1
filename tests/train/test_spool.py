import errno
import subprocess
import sys
import threading

import numpy as np
import pytest

from embax.train._input.spool import Spool


@pytest.mark.parametrize("in_memory", [1 << 20, 40])
def test_spool_returns_written_items(in_memory):
    spool = Spool(in_memory)
    for first in range(0, 100, 7):
        spool.append(np.arange(first, min(first + 7, 100), dtype=np.int32))
    assert spool.length == 100
    spool.write(20, np.asarray([-1, -2], np.int32))
    expected = [*range(20), -1, -2, *range(22, 100)]
    assert spool.read(0, 1000).tolist() == expected
    assert spool.read(19, 3).tolist() == [19, -1, -2]
    assert not spool.read(19, 3).flags.writeable
    spool.cut(21)
    assert (spool.length, spool.read(18, 100).tolist()) == (21, [18, 19, -1])
    assert spool.read(21, 1).tolist() == spool.read(30, 1).tolist() == []


def test_spool_is_read_by_several_threads():
    spool, wrong = Spool(0), []
    spool.append(np.arange(30_000, dtype=np.int32))

    def read():
        for first in range(0, 30_000, 100):
            if spool.read(first, 100).tolist() != list(range(first, first + 100)):
                wrong.append(first)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


SCRIPT = """
import resource, sys
import numpy as np
from embax.train._input.spool import Spool
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    Spool(100).append(np.zeros(500, np.int32))
except OSError as error:
    print(error.errno, error.strerror, error.filename, sep="|")
"""


def test_spool_error_for_a_full_disk_names_its_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=60)
    number, reason, folder = done.stdout.strip().split("|")
    assert int(number) == errno.EFBIG
    assert reason.endswith("for the numbered words. Set TMPDIR to a folder with more space")
    assert (folder, done.stderr) == (str(tmp_path), "")
