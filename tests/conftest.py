"""Discipline for all tests: 8 CPU devices in one process, no silent broadcasting between ranks."""

import os
import shutil
import subprocess

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """What is compiled in tests is not kept among the user's; workers share it."""
    base = tmp_path_factory.getbasetemp()
    os.environ["XDG_CACHE_HOME"] = str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache")


@pytest.fixture(scope="module")
def quick_compilation(tmp_path_factory):
    """Whole jobs repeat the same programs: keep what is compiled, and do not polish it (slow tests do)."""
    settings = {  # and their defaults
        "jax_compilation_cache_dir": (str(tmp_path_factory.mktemp("compiled")), None),
        "jax_persistent_cache_min_compile_time_secs": (0.0, 1.0),
        "jax_disable_most_optimizations": (True, False),
    }
    for name, (value, _) in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, (_, default) in settings.items():
        jax.config.update(name, default)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def refused():
    """A function that looks at how a job was refused."""

    def refused(capsys, code, expected, *found):
        """Make sure that a job ended with exit code `expected` and nothing but lines that say why; the lines."""
        told = capsys.readouterr().err.splitlines()
        assert code == expected, told
        assert told and all(line.startswith("mae-jax: ") for line in told)
        for words in found:
            assert any(words in line for line in told), (words, told)
        return told

    return refused


@pytest.fixture
def small_disk(tmp_path):
    """A function: so many bytes -> a folder with a file system of that size, where one can be mounted."""
    mounted = []

    def mount(size):
        folder = tmp_path / f"disk_{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)
