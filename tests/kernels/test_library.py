"""The native library: found, refused or switched off, and the report of it."""

import functools
import importlib
import subprocess
import sys
import types

import pytest

import embax
from embax import kernels
from embax._kernels import library as _library


@pytest.fixture
def load(monkeypatch):
    """Load the library anew, as another process would, without making its kernels known to XLA again."""
    monkeypatch.delenv("EMBAX_KERNELS", raising=False)
    monkeypatch.setattr(_library.jax.ffi, "register_ffi_target", lambda *_, **__: None)
    monkeypatch.setattr(_library, "_library", functools.cache(_library._library.__wrapped__))
    return _library.library


def installed(monkeypatch, path):
    package = types.SimpleNamespace(library_path=lambda: path)
    monkeypatch.setattr(importlib, "import_module", lambda name: package)


def test_load_returns_none_if_switched_off(load, monkeypatch):
    monkeypatch.setenv("EMBAX_KERNELS", "0")
    assert load() is None
    assert str(kernels.report()) == "Native kernels: switched off by EMBAX_KERNELS=0. XLA does all the work."


def test_another_switch_is_refused(load, monkeypatch):
    monkeypatch.setenv("EMBAX_KERNELS", "off")
    with pytest.raises(ValueError, match="`EMBAX_KERNELS` must be 0 or 1, got 'off'"):
        load()


def test_load_returns_none_if_not_installed(load, monkeypatch):
    def import_module(name):
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    assert load() is None
    assert "not installed, see `pip install ./kernels`" in str(kernels.report())
    assert kernels.report() == kernels.Kernels(False, "", "", 0, ())


def test_load_names_a_missing_dependency(load, monkeypatch):
    def import_module(name):
        raise ModuleNotFoundError(name="another")

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(ModuleNotFoundError):
        load()


def test_load_refuses_other_files(load, monkeypatch, tmp_path):
    (tmp_path / "libembax_kernels.so").write_text("no library")
    installed(monkeypatch, tmp_path / "libembax_kernels.so")
    with pytest.raises(ImportError, match=r"must load, got: .*Install it anew, or set EMBAX_KERNELS=0"):
        load()


def test_another_library_is_refused(load, monkeypatch):
    installed(monkeypatch, None)  # the process itself, which has no kernels
    monkeypatch.setattr(_library.ctypes, "CDLL", lambda _: types.SimpleNamespace())
    with pytest.raises(ImportError, match=r"must load, got: .*embax_kernels_version"):
        load()


def test_another_version_is_refused(load, monkeypatch):
    def version():
        return b"0.0.1"

    native = types.SimpleNamespace(embax_kernels_version=version, embax_kernels_isa=version)
    installed(monkeypatch, None)
    monkeypatch.setattr(_library.ctypes, "CDLL", lambda _: native)
    with pytest.raises(ImportError, match=rf"must be of version {embax.__version__}, .*, got 0.0.1. .*./kernels"):
        load()


def test_the_choice_holds_for_the_process(load, monkeypatch):
    """Since programs that are compiled are kept, the two would be mixed."""
    monkeypatch.setenv("EMBAX_KERNELS", "0")
    assert load() is None
    monkeypatch.setenv("EMBAX_KERNELS", "1")
    assert load() is None


def test_module_prints_the_report_and_fails_without_kernels():
    code = "import os, runpy; os.environ['EMBAX_KERNELS'] = '0'; runpy.run_module('embax.kernels', run_name='__main__')"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.stdout == "Native kernels: switched off by EMBAX_KERNELS=0. XLA does all the work.\n"
    assert done.returncode == 1


@pytest.mark.skipif(_library.library() is None, reason="kernels are not installed, or switched off")
def test_the_report_of_kernels_names_them():
    report = kernels.report()
    assert report.in_use
    assert report.version == embax.__version__
    assert report.threads >= 1
    assert set(report.primitives) >= {"take", "put", "combine", "pool"}
    assert f"Native kernels {embax.__version__} for the CPU: take, " in str(report)
    assert f"Instruction set: {report.instruction_set}. Threads: up to {report.threads}." in str(report)
