"""The suite itself: it ends when a process dies or a test hangs, and what it keeps compiled reports the same."""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from hlo import arrays, collectives
from jax.experimental.compilation_cache import compilation_cache
from meshes import mesh_of

import embax

ROOT = Path(__file__).parents[2]

# Tests that never end well. The second one holds Python's lock, like a library that waits in C++.
BAD = {"aborts": "import os\n    os.abort()", "hangs": "import ctypes\n    ctypes.PyDLL(None).sleep(600)"}


def run_as_make_does(folder, *options):
    """Run the tests of a folder by the command of `make test` for one area."""
    make = ["make", "--dry-run", "test", "AREA=any"]
    lines = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (command,) = re.findall(r"^.*/python (-m pytest .*) tests/any$", lines, re.MULTILINE)
    command = [sys.executable, *shlex.split(command), f"--config-file={ROOT / 'pyproject.toml'}", *options, str(folder)]
    # Of the plugins, these tests need the one alone that shares them out.
    command += ["-p", "xdist.plugin"]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)


@pytest.mark.parametrize("what", BAD)
def test_a_process_that_dies_ends_the_run_with_the_name_of_its_test(what, tmp_path):
    (tmp_path / "test_bad.py").write_text(f"def test_{what}():\n    {BAD[what]}\n\n\ndef test_after():\n    pass\n")
    (tmp_path / "test_good.py").write_text("def test_good():\n    pass\n")
    done = run_as_make_does(tmp_path, "-o", "faulthandler_timeout=1")
    assert done.returncode == 1
    assert re.search(rf"worker 'gw\d' crashed while running '.*::test_{what}'", done.stdout)
    assert "worker restarting disabled" in done.stdout


def test_a_test_has_five_minutes(pytestconfig):
    assert pytestconfig.getini("faulthandler_timeout") == 300
    assert pytestconfig.getini("faulthandler_exit_on_timeout")


@pytest.fixture
def own_cache(tmp_path):
    """An empty folder for compiled programs."""
    before = jax.config.jax_compilation_cache_dir
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize("devices", [2, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_cached_program_reports_the_same_as_a_new_one(devices, own_cache):
    """So that tests of memory and HLO may take programs from there."""
    table = embax.Table(np.zeros((1000, 8), np.float32), max_norm=1.0)
    table = embax.shard(table, mesh_of({"x": devices}), "x") if devices > 1 else table

    def step(table, ids):
        return embax.lookup(table, ids), embax.renormalize(table, ids)

    def compiled():
        jax.clear_caches()
        program = jax.jit(step, donate_argnums=0).lower(table, np.zeros(64, np.int32)).compile()
        found = [(x.kind, x.devices, x.arrays) for x in collectives(program)]
        return str(program.memory_analysis()), found, arrays(program.as_text())

    hits = []
    jax.monitoring.register_event_listener(count := lambda event, **_: hits.append(event) if "hit" in event else None)
    try:
        new, kept = compiled(), compiled()
    finally:
        jax.monitoring.unregister_event_listener(count)
    assert any(own_cache.iterdir())
    assert hits
    assert new == kept
    assert bool(new[1]) == (devices > 1)


@pytest.mark.parametrize("entries", ["_VERSIONS", "_XLA"])
def test_entries_of_tests_that_run_twice_name_existing_tests(entries, pytestconfig):
    conftest = next(plugin for plugin in pytestconfig.pluginmanager.get_plugins() if hasattr(plugin, "_VERSIONS"))
    for start in getattr(conftest, entries):
        path, _, name = start.partition("::")
        assert (ROOT / path).exists()
        assert f"def {name}" in (ROOT / path).read_text() if name else True


def test_no_test_imports_another():
    support = {path.stem for path in (ROOT / "tests/support").glob("*.py")}
    tests = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    assert len(tests) > 100
    assert not support & tests
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] in tests | {"tests"}], path


def test_packages_are_small():
    """Of twelve modules at most, besides its packages; and of files at the top, only what is public."""
    for folder in [ROOT / "src/embax", *(path for path in (ROOT / "src/embax").rglob("*") if path.is_dir())]:
        modules = [path.name for path in folder.glob("*.py") if not path.name.startswith("__")]
        assert len(modules) <= 12, folder
    assert not [path.name for path in (ROOT / "src/embax").glob("_[!_]*.py")]


def test_each_folder_of_tests_has_a_package():
    packages = {path.name.lstrip("_") for path in (ROOT / "src/embax").iterdir() if path.is_dir()}
    folders = {path.name for path in (ROOT / "tests").iterdir() if any(path.glob("test_*.py"))}
    assert folders - packages == {"project"}
