"""Build of the native extensions. The static metadata is in pyproject.toml.

torch's own BuildExtension knows no per-file flags, which the instruction sets need, falls back
silently when ninja is missing and compiles CUDA only under a torch with CUDA. So this file writes
one build.ninja per interpreter and torch version, under build/, and copies what ninja made to where
setuptools expects it. ninja tracks the headers, so after an edit only what depends on it is
compiled again.

Environment: CXX, CXXFLAGS, LDFLAGS as usual; MAX_JOBS bounds the compiler processes.
build_backend/nvcc.py says what LAYERLR_CUDA and LAYERLR_CUDA_ARCH are.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))

import nvcc  # noqa: E402
from nvcc import stop  # noqa: E402

LINUX = sys.platform == "linux"
X86 = platform.machine() in ("x86_64", "AMD64")

COMPILE_FLAGS = [
    *"-O3 -g0 -fPIC -fvisibility=hidden".split(),
    # The numerics contract: no fused multiply-add that the reference does not write.
    "-ffp-contract=off",
    # Without it sqrtf must set errno, which blocks vectorisation.
    "-fno-math-errno",
    *"-Wall -Wextra -Wno-psabi -Wno-unknown-pragmas".split(),
    *(["-fopenmp"] if LINUX else []),
    *(["-DLAYERLR_X86=1"] if X86 else []),
]
# By the ending of the file's name; the other files run on any processor of the architecture.
ISA_FLAGS = {
    "_avx2": "-mavx2 -mfma -mf16c".split(),
    "_avx512": [
        *"-mavx512f -mavx512dq -mavx512vl -mavx512bw -mavx2 -mfma -mf16c".split(),
        "-mprefer-vector-width=512",
        # GCC 12 takes its own intrinsics for uses of uninitialised registers.
        *"-Wno-maybe-uninitialized -Wno-uninitialized".split(),
    ],
}
LINK_FLAGS = ["-shared", "-s"] if LINUX else ["-bundle", "-undefined", "dynamic_lookup"]


def isa_flags(source):
    """Return the instruction-set flags of a source file."""
    return next((flags for end, flags in ISA_FLAGS.items() if Path(source).stem.endswith(end)), [])


def sources(*patterns, but=()):
    """Return the files of an extension for this architecture, relative to the root."""
    files = {str(file.relative_to(ROOT)) for pattern in patterns for file in ROOT.glob(pattern)}
    return sorted(file for file in files - set(but) if X86 or not isa_flags(file))


def native_extensions():
    """Return what each extension is made of."""
    cuda_bindings = "csrc/cuda/bindings.cpp"
    extensions = [
        Extension(
            "layerlr._C",
            sources("csrc/*.cpp", "csrc/cpu/*.cpp", "csrc/cuda/*.cpp", but=[cuda_bindings]),
            libraries=["c10", "torch_cpu", "torch_python"],
            extra_link_args=["-fopenmp"] if LINUX else [],
        )
    ]
    compiler, _ = nvcc.choose()
    if compiler:
        architectures = ";".join(nvcc.architectures(compiler))
        extensions.append(
            Extension(
                "layerlr._cuda",
                sources("csrc/cuda/*.cu", cuda_bindings),
                define_macros=[("LAYERLR_CUDA_ARCH", f'"{architectures}"')],
                library_dirs=nvcc.library_dirs(compiler),
                # The static runtime: loads without a driver, and beside torch's own.
                libraries=["cudart_static", "dl", "rt", "pthread"],
            )
        )
    return extensions


def find_torch():
    """Return the torch module to build against."""
    try:
        import torch
    except ModuleNotFoundError:
        stop("the build needs PyTorch: install it first (https://pytorch.org), then repeat.")
    if torch_version(torch) < (2, 11):
        stop(f"the build needs PyTorch 2.11 or newer, found {torch.__version__}.")
    return torch


def torch_version(torch):
    """Return torch's version as (major, minor)."""
    return tuple(int(part) for part in torch.__version__.split(".")[:2])


def find_compiler():
    """Return the C++ compiler's command as a list of words."""
    if sys.platform == "win32":
        stop("Windows is not supported: install it in WSL.")
    command = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if not shutil.which(command[0]):
        stop(
            f"the build needs a C++ compiler and found no '{command[0]}': "
            "install g++ (Debian, Ubuntu: apt install g++) or point CXX at one."
        )
    return command


def find_ninja():
    """Return the ninja program: the environment's, activated or not, or the one on the PATH."""
    folders = [sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]
    program = shutil.which("ninja", path=os.pathsep.join(folders))
    return program or stop("the build needs ninja: pip install ninja.")


def find_python_headers():
    """Return the folder of Python.h."""
    folder = sysconfig.get_paths()["include"]
    if not Path(folder, "Python.h").is_file():
        stop(
            f"the build needs Python's headers and found none in {folder}: "
            "install them (Debian, Ubuntu: apt install python3-dev)."
        )
    return folder


def words(parts):
    """Return command-line words quoted for the shell and for ninja."""
    return shlex.join(map(str, parts)).replace("$", "$$")


def direction_groups():
    """Return the directions that each header defines, as a macro's list: what kernels.cu makes."""
    listed = re.findall(r"X\((\w+)\)", (ROOT / "csrc/directions/all.h").read_text())
    groups = {}
    for header in sorted(ROOT.glob("csrc/directions/*.h")):
        defined = re.findall(r"^struct (\w+)|^using (\w+)", header.read_text(), re.MULTILINE)
        names = [name for name in listed if any(name in pair for pair in defined)]
        if names:
            groups[header.stem] = " ".join(f"X({name})" for name in names)
    return groups


def compiled(source):
    """Return the objects that a source is compiled to, and what each of them is told."""
    if Path(source).name != "kernels.cu":
        return {f"{source}.o": []}
    return {
        f"{source}.{stem}.o": [f"-DLAYERLR_KERNELS_OF(X)={names}"]
        for stem, names in direction_groups().items()
    }


def path(name):
    """Return a path escaped for a ninja build line."""
    return str(name).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def cuda_rule(compiler):
    """Return the ninja rule for .cu files."""
    command = words([compiler, *nvcc.flags(compiler, COMPILE_FLAGS, ROOT / "csrc")])
    return [
        "rule cuda",
        f"  command = {command} $more -MMD -MF $out.d -c $in -o $out >$out.log 2>&1 "
        "|| { cat $out.log; exit 1; }; grep -w warning $out.log || :",
        "  depfile = $out.d",
        "  deps = gcc",
    ]


def build_ninja(torch, extensions):
    """Return the text of build.ninja: one object per source, one library per extension."""
    from torch.utils.cpp_extension import include_paths, library_paths

    standard = "c++20" if torch_version(torch) >= (2, 12) else "c++17"
    # As system headers, so that our warnings are ours alone.
    system = [word for folder in include_paths() for word in ("-isystem", folder)]
    compile_flags = [
        f"-std={standard}",
        *COMPILE_FLAGS,
        f"-I{ROOT / 'csrc'}",
        *system,
        *("-isystem", find_python_headers()),
        *shlex.split(os.environ.get("CXXFLAGS", "")),
    ]
    link_flags = [*LINK_FLAGS, *shlex.split(os.environ.get("LDFLAGS", ""))]
    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {words(find_compiler())}",
        f"flags = {words(compile_flags)}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags $more -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx {words(link_flags)} $in -o $out $libraries",
    ]
    compiler, why_not = nvcc.choose()
    lines += cuda_rule(compiler) if compiler else []
    for extension in extensions:
        macros = [f"-D{name}={value}" for name, value in extension.define_macros]
        objects = []
        for source in extension.sources:
            rule = "cuda" if source.endswith(".cu") else "compile"
            own = [f'-DLAYERLR_NO_CUDA="{why_not}"'] if source == "csrc/bindings.cpp" else []
            for target, told in compiled(source).items():
                objects.append(path(target))
                lines.append(f"build {objects[-1]}: {rule} {path(ROOT / source)}")
                lines.append(f"  more = {words([*isa_flags(source), *macros, *own, *told])}")
        # No rpath: layerlr imports torch, and with it these libraries, before its own.
        libraries = [f"-L{folder}" for folder in [*library_paths(), *extension.library_dirs]]
        libraries += [*(f"-l{name}" for name in extension.libraries), *extension.extra_link_args]
        lines.append(f"build {extension.name}.so: link {' '.join(objects)}")
        lines.append(f"  libraries = {words(libraries)}")
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    """setuptools' build_ext with ninja in place of its compiler driver."""

    def run(self):
        """Build, and remove the CUDA library of an earlier build if this one makes none."""
        super().run()
        if "layerlr._cuda" not in {extension.name for extension in self.extensions}:
            for folder in [self.build_lib, *([ROOT] if self.inplace else [])]:
                Path(folder, self.get_ext_filename("layerlr._cuda")).unlink(missing_ok=True)

    def build_extensions(self):
        """Write build.ninja, run it, put the libraries where setuptools wants them."""
        torch = find_torch()
        compiler, why_not = nvcc.choose()
        word = nvcc.ahead(compiler) if compiler else f"the CUDA engine is left out: {why_not}"
        if word:
            print(f"layerlr: {word}", file=sys.stderr)
        program = find_ninja()
        folder = ROOT / "build" / f"ninja-{sys.implementation.cache_tag}-torch{torch.__version__}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(build_ninja(torch, self.extensions))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run([program, "-C", folder, *jobs]).returncode:
            stop(
                "the native build failed; the compiler's messages are above. "
                "LAYERLR_CUDA=0 leaves the CUDA kernels out."
            )
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / f"{extension.name}.so", target)


packages = find_packages(include=["layerlr", "layerlr.*"])
package_dir = {}
if (ROOT / "kernels" / "__init__.py").is_file():
    packages.append("layerlr.kernels")
    package_dir["layerlr.kernels"] = "kernels"

setup(
    packages=packages,
    package_dir=package_dir,
    package_data={"layerlr": ["py.typed", "*.pyi"]},
    ext_modules=native_extensions(),
    cmdclass={"build_ext": NinjaBuild},
)
