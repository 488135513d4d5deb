"""Builds beagle_kernels._C with ninja: g++ always, nvcc where it is found.

BEAGLE_CUDA=auto|0|1 (1: fail without nvcc), BEAGLE_CUDA_ARCHS="80;90" (PTX of the newest is added), MAX_JOBS,
CXX (nvcc's host compiler too), NVCC.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
DEFAULT_ARCHS = "80;90"
AVX2 = "-mavx2 -mfma"
AVX512 = "-mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512"
INSTRUCTION_SETS = {
    "avx2": (AVX2, ("rows", "products", "int8_product", "layer_steps")),
    "avx2_vnni": (f"{AVX2} -mavxvnni", ("int8_product",)),
    "avx512": (AVX512, ("rows", "products", "int8_product", "layer_steps")),
    "avx512_vnni": (f"{AVX512} -mavx512vnni", ("int8_product",)),
    "avx512_bf16": (f"{AVX512} -mavx512bf16", ("products",)),
}
"""Of x86-64: the compiler's flags, and what is compiled with them besides the baseline; one is chosen at run time."""
FUSED = ("tree_attention", "attention_exact", "products", "layer_steps")
"""With fused multiply-adds: the ops that have no exact twin on another backend."""
SLOW = ("rows", "tree_attention")
"""What compiles longest: with many cores, it is begun first."""
LAUNCHERS = ("ccache", "distcc", "sccache")
"""What may stand before the compiler in CXX."""


def find_nvcc() -> tuple[str | None, str]:
    """nvcc's path, or None, and why not."""
    wish = os.environ.get("BEAGLE_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        sys.exit(f"BEAGLE_CUDA is {wish!r}; allowed: auto, 0, 1")
    if wish == "0":
        return None, "built with BEAGLE_CUDA=0"
    home = os.environ.get("CUDA_HOME")
    nvcc = os.environ.get("NVCC") or (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")
    if nvcc is None and wish == "1":
        sys.exit("BEAGLE_CUDA=1, but nvcc was not found; put it on PATH or set CUDA_HOME or NVCC")
    return nvcc, "" if nvcc else "built where nvcc was not found (set CUDA_HOME or NVCC and build again)"


def cuda_archs() -> list[str]:
    return os.environ.get("BEAGLE_CUDA_ARCHS", DEFAULT_ARCHS).replace(",", ";").split(";")


def host_compiler() -> list[str]:
    """nvcc's flag for CXX, where it is set, without a launcher before it."""
    words = [word for word in shlex.split(os.environ.get("CXX", "")) if Path(word).name not in LAUNCHERS]
    return [f"-ccbin={words[0]}"] if words else []


def cuda_flags() -> list[str]:
    """One binary per architecture, PTX of the newest; spills and local memory are warned of."""
    archs = cuda_archs()
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    newest = max(int(arch.rstrip("af")) for arch in archs)
    return [
        *host_compiler(),
        *flags,
        f"-gencode=arch=compute_{newest},code=compute_{newest}",
        "-cudart=static",
        # the host's arithmetic, bit for bit: no fused multiply-add
        "--fmad=false",
        "-Xptxas=-warn-spills,-warn-lmem-usage",
        "-Xcompiler=-fPIC,-fvisibility=hidden",
    ]


def max_jobs() -> int:
    """MAX_JOBS, or what cores and memory allow at 2 GiB a job."""
    if "MAX_JOBS" in os.environ:
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 4 << 30
    return max(1, min(cores, memory >> 31))


def ninja_file(target: Path, nvcc: str | None, why_not: str) -> str:
    """The build in ninja's language: one edge a source, one link."""
    import pybind11

    cxx = os.environ.get("CXX") or "g++"
    common = ["-std=c++17", "-O3", "-DNDEBUG"]
    includes = [f"-isystem {sysconfig.get_path('include')}", f"-isystem {pybind11.get_include()}"]
    host = ["-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall"]
    # gcc 12 warns of its own intrinsics header
    host += ["-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
    defines = ["-DBEAGLE_CUDA"] if nvcc else []
    texts = {"BEAGLE_NO_CUDA": why_not, "BEAGLE_ARCHS": ";".join(cuda_archs())}
    told = " ".join(f"-D{name}='\"{text}\"'" for name, text in texts.items())
    linker = " ".join([nvcc, "-cudart=static", *host_compiler()]) if nvcc else cxx
    lines = [
        "rule cxx",
        f"  command = {cxx} -MMD -MF $out.d {' '.join(common + host + defines)} $extra -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule nvcc",
        f"  command = {nvcc} -MMD -MF $out.d {' '.join(common + (cuda_flags() if nvcc else []))} -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {linker} -shared $in -o $out -lpthread",
    ]
    sources = sorted((CSRC / "cpu").glob("*.cpp"), key=lambda source: (source.stem not in SLOW, source))
    sources += [CSRC / "bindings.cpp", *(sorted((CSRC / "cuda").glob("*.cu")) if nvcc else [])]
    objects = []
    x86 = platform.machine() in ("x86_64", "AMD64")
    for name, (flags, stems) in INSTRUCTION_SETS.items() if x86 else ():
        for stem in stems:
            objects.append(f"{stem}_{name}.o")
            fused = "-ffp-contract=fast" if stem in FUSED else ""
            lines.append(f"build {objects[-1]}: cxx {CSRC / 'cpu' / stem}.cpp")
            lines.append(f"  extra = -DBEAGLE_ISA={name} {flags} {fused}")
    for source in sources:
        objects.append(f"{source.parent.name}_{source.stem}.o")
        lines.append(f"build {objects[-1]}: {'nvcc' if source.suffix == '.cu' else 'cxx'} {source}")
        if source.name == "dispatch.cpp" and x86:
            lines.append("  extra = -DBEAGLE_X86")
        if source.name == "bindings.cpp":
            lines.append(f"  extra = {' '.join(includes)} {told}")
        if source.stem in FUSED:
            lines.append("  extra = -ffp-contract=fast")
    lines += [f"build {target}: link {' '.join(objects)}", f"default {target}", ""]
    return "\n".join(lines)


class NinjaBuild(build_ext):
    """setuptools' build_ext with the compiling left to ninja."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        nvcc, why_not = find_nvcc()
        if why_not:
            print(f"beagle_kernels: no CUDA half: {why_not}")
        text = ninja_file(target, nvcc, why_not)
        file = folder / "build.ninja"
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder), f"-j{max_jobs()}"], check=True)


setup(ext_modules=[Extension("beagle_kernels._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
