"""C++ is compiled once and kept whole; what cannot be compiled is done without."""

import ctypes
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mae_jax import compiled

COMPILER = os.environ.get("CXX", "c++")


def library(source, *options):
    """Its path, as in a new process, which remembers nothing."""
    return compiled.library.__wrapped__(source, Path, *options)


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    """The folder that libraries are kept in, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return compiled.folder("native")


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "answer.cc"
    path.write_text('extern "C" int answer() { return ANSWER; }')
    return path


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Do something in the shell before each compilation of something to "$to". Gives the file that lists them."""
    if not shutil.which(COMPILER.split()[0]):
        pytest.skip("no C++ compiler")

    def prepare(before=""):
        script, log = tmp_path / "compiler", tmp_path / "log"
        compiling = f'for to; do :; done\necho "$to" >> {log}\n{before}'
        script.write_text(f'#!/bin/sh\ncase "$*" in *" -o "*)\n{compiling}\nesac\nexec {COMPILER} "$@"')
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return log

    return prepare


def answer(path):
    return ctypes.CDLL(str(path)).answer()


def test_a_source_is_compiled_once_and_kept(source, kept, compiler):
    log = compiler()
    path = library(source, "-DANSWER=42")
    assert answer(path) == 42
    assert library(source, "-DANSWER=42") == path
    assert len(log.read_text().splitlines()) == 1
    assert list(kept.iterdir()) == [path]


def test_what_is_deleted_is_compiled_again(source, kept, compiler):
    log = compiler()
    path = library(source, "-DANSWER=1")
    shutil.rmtree(kept)
    assert library(source, "-DANSWER=1") == path and path.exists()
    assert len(log.read_text().splitlines()) == 2


def flip(contents):
    return (
        contents[: len(contents) // 2] + bytes([contents[len(contents) // 2] ^ 1]) + contents[len(contents) // 2 + 1 :]
    )


DAMAGE = {"flipped": flip, "cut short": lambda contents: contents[: len(contents) // 2], "empty": lambda contents: b""}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_is_damaged_is_compiled_again(damage, source, kept, compiler):
    log = compiler()
    path = library(source, "-DANSWER=8")
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert library(source, "-DANSWER=8") == path and path.read_bytes() == whole and list(kept.iterdir()) == [path]
    assert answer(path) == 8
    assert len(log.read_text().splitlines()) == 2


PROGRAMS = """
import jax, pathlib, sys
from mae_jax import compiled
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
compiled.replace_damaged(pathlib.Path(sys.argv[1]))
print(jax.jit(lambda x: x * 2 + 1)(20.5), jax.jit(lambda x: x - 1)(8.0))
"""


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_programs_of_xla_that_are_damaged_are_compiled_again(damage, tmp_path):
    def run():
        command = [sys.executable, "-c", PROGRAMS, tmp_path]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
        assert done.returncode == 0 and not done.stderr, done.stderr
        return done.stdout.splitlines()

    assert run() == ["42.0 7.0"]
    programs = sorted(tmp_path.glob("*-cache"))
    for path in programs:
        path.write_bytes(damage(path.read_bytes()))
    told, answers = run()
    assert f"{tmp_path}: {len(programs)} damaged, compiled anew" in told and answers == "42.0 7.0"
    assert run() == ["42.0 7.0"], "and kept"


def test_other_sources_options_and_compilers_have_libraries_of_their_own(source, kept, compiler, monkeypatch):
    compiler()
    paths = [library(source, "-DANSWER=1"), library(source, "-DANSWER=2")]
    source.write_text('extern "C" int answer() { return 3; }')
    paths.append(library(source, "-DANSWER=2"))
    source.write_text('extern "C" int answer() { return ANSWER; }')
    monkeypatch.setenv("CXX", f"{COMPILER} -DANSWER=4")
    paths.append(library(source))
    assert [answer(path) for path in paths] == [1, 2, 3, 4]
    assert set(kept.iterdir()) == set(paths)


def test_nobody_finds_half_a_library(source, kept, compiler, tmp_path):
    compiler(before=f'echo half > "$to"\nls {kept} > {tmp_path}/meanwhile')
    path = library(source, "-DANSWER=5")
    assert answer(path) == 5
    assert path.name not in (tmp_path / "meanwhile").read_text()


def test_many_at_once_get_the_same(source, kept, compiler):
    compiler()
    with ThreadPoolExecutor(4) as threads:
        paths = set(threads.map(lambda _: library(source, "-DANSWER=6"), range(4)))
    assert list(kept.iterdir()) == list(paths) and answer(*paths) == 6


def warning_without(source, caplog, load=Path):
    """That there is no library; the one line logged about it, however often it is asked for."""
    assert compiled.library(source, load, "-DANSWER=7") is None
    assert compiled.library(source, load, "-DANSWER=7") is None
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.getMessage().startswith("answer.cc is not used")
    return record.getMessage()


@pytest.mark.parametrize("command", ["/nonexistent/c++", "false", "cat"])
def test_without_a_compiler_there_is_a_warning(command, source, kept, monkeypatch, caplog):
    monkeypatch.setenv("CXX", command)
    assert command in warning_without(source, caplog)
    assert not kept.exists()


def test_what_is_told_of_a_compiler_that_fails_is_its_error(source, compiler, caplog):
    compiler(before='echo "In file included from there:" >&2\necho "there:7: error: no such thing" >&2\nexit 1')
    assert warning_without(source, caplog).endswith("there:7: error: no such thing")


def test_a_compiler_that_fails_leaves_nothing_behind(source, kept, compiler, caplog):
    compiler(before='echo half > "$to"\necho out of luck >&2\nexit 1')
    assert "out of luck" in warning_without(source, caplog)
    assert not list(kept.iterdir())


def test_errors_in_the_source_are_told(source, kept, compiler, caplog):
    compiler()
    source.write_text('extern "C" int answer() { return what; }')
    assert str(source) in warning_without(source, caplog)
    assert not list(kept.iterdir())


def test_a_cache_folder_that_cannot_be_made_is_no_error(source, compiler, tmp_path, monkeypatch, caplog):
    compiler()
    monkeypatch.setenv("XDG_CACHE_HOME", str(source))
    assert str(source) in warning_without(source, caplog)


def test_a_library_that_cannot_be_loaded_is_done_without(source, compiler, tmp_path, caplog):
    compiler()
    empty = tmp_path / "empty.so"
    empty.touch()
    assert str(empty) in warning_without(source, caplog, lambda path: ctypes.CDLL(str(empty)))
