"""Empty CUDA libraries, with which MindSpore's GPU plugin loads on a machine without a GPU.

MindSpore compiles for several devices only where its device target is Ascend or GPU. PyPI's wheel has no Ascend plugin
that would load without Ascend's software, but it has a GPU plugin, which needs nothing but CUDA's libraries. These have
every function that the plugin asks for; all but a few do nothing and return 0, which is success to all of them. A
network can be compiled with them up to the choice of kernels, and cannot run.
"""
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Dict

__all__ = ["NotPossible", "cuda_stubs"]

CUDA = "11.6"
PLUGIN = f"libmindspore_gpu.so.{CUDA}"

# What the plugin reads while it loads: a device, its memory, handles.
WITH_RESULTS = {
    "cudaGetDeviceCount": "(int *count) { *count = 64; return 0; }",
    "cudaGetDeviceProperties": "(char *device, int i) { memset(device, 1, 256); device[255] = 0; return 0; }",
    "cudaMalloc": "(void **memory, size_t size) { *memory = malloc(size + !size); return 0; }",
    "cudaHostAlloc": "(void **memory, size_t size, unsigned flags) { *memory = malloc(size + !size); return 0; }",
    "cudaFree": "(void *memory) { free(memory); return 0; }",
    "cudaFreeHost": "(void *memory) { free(memory); return 0; }",
    "cudaMemGetInfo": "(size_t *free, size_t *all) { *free = *all = 1UL << 36; return 0; }",
}


class NotPossible(Exception):
    """Why a machine cannot do this, for a skipped test."""


def run(*command):
    """A command's output.

    Raises:
        NotPossible: it is missing or fails.
    """
    if not shutil.which(command[0]):
        raise NotPossible(f"{command[0]} is not installed")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise NotPossible(f"{command[0]} fails: {(result.stderr.strip().splitlines() or ['?'])[-1]}")
    return result.stdout


def needed_functions(plugins):
    """{file name of a CUDA library: names of the functions} that the plugin's undefined symbols ask for."""
    # A symbol's version is its library's name. Where there is none, functions of the same prefix tell: cudnn..., cu...
    listing = run("nm", "-D", "--undefined-only", *plugins)
    symbols = re.findall(r" U ((?:__)?(cu[a-z]*|nvrtc)[A-Z]\w*)(?:@+(\S+))?", listing)
    libraries = {"cu": "libcuda.so.1", **{prefix: version for _, prefix, version in symbols if version}}
    found = {}
    for name, prefix, _ in symbols:
        if prefix in libraries:
            found.setdefault(libraries[prefix], set()).add(name)
    if "libcudart.so.11.0" not in found:
        raise NotPossible("nm prints no versions of symbols, binutils 2.35 does")
    return found


def c_source(functions):
    """The C source of a library with these functions."""
    lines = ["#include <stdlib.h>", "#include <string.h>"]
    for name in sorted(functions):
        if name in WITH_RESULTS:
            lines.append(f"int {name}{WITH_RESULTS[name]}")
        elif name.endswith(("ErrorString", "ErrorName")):
            lines.append(f'const char *{name}() {{ return "no device"; }}')
        elif re.search("Create|Init", name):  # they give a handle back
            lines.append(f"int {name}(void **handle) {{ *handle = malloc(64); return 0; }}")
        else:
            lines.append(f"int {name}() {{ return 0; }}")
    return "\n".join(lines) + "\n"


def cuda_stubs(folder: Path) -> Dict[str, str]:
    """Compile the libraries into a folder; returns the environment in which MindSpore finds them.

    Raises:
        NotPossible: not Linux on x86-64, no GPU plugin in this MindSpore, no C compiler.
    """
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise NotPossible(f"MindSpore's GPU plugin is for Linux on x86-64, not {platform.system()} on "
                          f"{platform.machine()}")
    mindspore = Path(importlib.util.find_spec("mindspore").submodule_search_locations[0])
    plugin = mindspore / "lib" / "plugin" / PLUGIN
    if not plugin.exists():
        raise NotPossible(f"this MindSpore has no {PLUGIN}")
    for library, functions in needed_functions([plugin, *sorted(plugin.with_name("gpu").glob("*.so*"))]).items():
        source, versions = folder / f"{library}.c", folder / f"{library}.map"
        source.write_text(c_source(functions), encoding="ascii")
        versions.write_text(f"{library} {{ global: *; }};\n", encoding="ascii")
        named = [] if library == "libcuda.so.1" else [f"-Wl,--version-script={versions}"]
        run("gcc", "-w", "-shared", "-fPIC", f"-Wl,-soname,{library}", *named, str(source), "-o", str(folder / library))
    compiler = folder / "bin" / "nvcc"  # MindSpore asks it for CUDA's version, and takes the plugin for that
    compiler.parent.mkdir()
    compiler.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {CUDA}, V{CUDA}.0\n", encoding="ascii")
    compiler.chmod(0o755)
    return {"CUDA_HOME": str(folder), "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}"}
