"""Builds the event engine's kernels at first use, by the user's own C++ compiler."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

SOURCE = Path(__file__).with_name("events.cpp")
FLAGS = ["-O3", "-std=c++17", "-fno-trapping-math", "-fno-math-errno"]
WAIT = 300  # seconds for another process's build


@functools.cache
def find_kernels():
    """-> (the library of the kernels, built before or now, None), or (None, in a line why there is none).

    DSR_MARCH: the compiler's -march, "native" if not given. The library lies in torch's folder of extensions
    (TORCH_EXTENSIONS_DIR), by the source, the flags, torch and the CPU: machines may share that folder.
    """
    march = f"-march={os.environ.get('DSR_MARCH', 'native')}"
    try:
        with quiet_loader() as loader:
            root = os.environ.get("TORCH_EXTENSIONS_DIR") or loader.get_default_build_root()
            library = Path(root, f"dsr_events_{key(march)}", "dsr_events.so")
            if not library.exists():
                library.parent.mkdir(parents=True, exist_ok=True)
                with FileLock(library.with_name("lock"), timeout=WAIT):
                    if not library.exists():
                        build(loader, library, march)
        return ctypes.CDLL(str(library)), None
    except Timeout:
        return None, f"another process has been building it for {WAIT} s"
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        lines = str(error).splitlines() or ["its build failed"]  # of torch, which shows the command first
        return None, next((line for line in lines if " error: " in line), lines[0])


def build(loader, library, march):
    """Compile in a folder of this process's own; only what is whole gets the library's name."""
    compiler = loader.get_cxx_compiler()
    if shutil.which(compiler) is None:
        raise RuntimeError(f"no C++ compiler: {compiler} was not found")
    own = library.with_name(f"{platform.node()}_{os.getpid()}")
    shutil.rmtree(own, ignore_errors=True)  # of a process that was killed in it, with torch's lock
    own.mkdir()
    print("building the event engine, once: ", end="", flush=True, file=sys.stderr)
    start, path = time.perf_counter(), os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), path])  # pip's ninja
    try:
        options = dict(build_directory=str(own), is_python_module=False, with_cuda=False)
        built = loader.load("dsr_events", [str(SOURCE)], extra_cflags=[*FLAGS, march], **options)
        Path(built).replace(library)
    except BaseException:
        print("failed", file=sys.stderr)
        raise
    finally:
        os.environ["PATH"] = path
        shutil.rmtree(own, ignore_errors=True)
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)


def key(march):
    """A name for this source on this machine."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = "model name", "flags", "Features"
        cpu += "".join(sorted({line for line in lines if line.startswith(names)}))
    parts = SOURCE.read_text(), march, *FLAGS, torch.__version__, cpu
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@contextmanager
def quiet_loader():
    """torch's loader of extensions, without its warnings of a CUDA runtime, which nobody needs here."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torch.utils import cpp_extension

            yield cpp_extension
    finally:
        logger.setLevel(level)
