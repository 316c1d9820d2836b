"""Build of the native extensions. The static metadata is in pyproject.toml.

torch's own BuildExtension knows no per-file flags, which the instruction sets need, falls back
silently when ninja is missing and compiles CUDA only under a torch with CUDA. So this file writes
two build.ninja under build/, one for what knows neither Python nor torch and serves all of them,
and one for each pair of these, and copies what ninja made to where setuptools expects it. ninja
tracks the headers, so after an edit only what depends on it is compiled again.

Environment: CXX, CXXFLAGS, LDFLAGS as usual; MAX_JOBS bounds the compiler processes.
build_backend/nvcc.py says what LAYERLR_CUDA and LAYERLR_CUDA_ARCH are, cuda_library.py beside it
what LAYERLR_CUDA_LIBRARY is.
"""

import os
import platform
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

import cuda_library  # noqa: E402
import directions  # noqa: E402
import nvcc  # noqa: E402
from cuda_library import stop  # noqa: E402

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
        *"-Wno-maybe-uninitialized -Wno-uninitialized -Wno-unknown-warning-option".split(),
    ],
}
#: sources that know neither Python nor torch
SHARED = ("csrc/plan.cpp", "csrc/cpu/", "csrc/cuda/")
CUDA_LIBRARY = "layerlr.liblayerlr_cuda"
LINK_FLAGS = ["-shared", "-s"] if LINUX else ["-bundle", "-undefined", "dynamic_lookup"]


def isa_flags(source):
    """Return the instruction-set flags of a source file."""
    return next((flags for end, flags in ISA_FLAGS.items() if Path(source).stem.endswith(end)), [])


def sources(*patterns):
    """Return the files of an extension for this architecture, relative to the root."""
    files = {str(file.relative_to(ROOT)) for pattern in patterns for file in ROOT.glob(pattern)}
    return sorted(file for file in files if X86 or not isa_flags(file))


def native_extensions():
    """Return what each extension is made of."""
    extensions = [
        Extension(
            "layerlr._C",
            sources("csrc/*.cpp", "csrc/cpu/*.cpp", "csrc/cuda/*.cpp"),
            libraries=["c10", "torch_cpu", "torch_python"],
            extra_link_args=["-fopenmp", "-ldl"] if LINUX else [],
        )
    ]
    compiler, _ = nvcc.choose()
    if given := cuda_library.given():
        extensions.append(Extension(CUDA_LIBRARY, [], extra_objects=[str(given)]))
    elif compiler:
        extensions.append(
            Extension(
                CUDA_LIBRARY,
                sources("csrc/cuda/*.cu"),
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


def path(name):
    """Return a path escaped for a ninja build line."""
    return str(name).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def folders(torch):
    """Return ninja's folders: of what knows neither Python nor torch, and of this pair."""
    pair = f"{sys.implementation.cache_tag}-torch{torch.__version__}"
    return ROOT / "build" / "ninja", ROOT / "build" / f"ninja-{pair}"


def rules(flags):
    """Return the lines that every build.ninja begins with."""
    flags = [*flags, *COMPILE_FLAGS, f"-I{ROOT / 'csrc'}"]
    flags += shlex.split(os.environ.get("CXXFLAGS", ""))
    link_flags = [*LINK_FLAGS, *shlex.split(os.environ.get("LDFLAGS", ""))]
    return [
        "ninja_required_version = 1.5",
        f"cxx = {words(find_compiler())}",
        f"flags = {words(flags)}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d $flags $more -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx {words(link_flags)} $in -o $out $libraries",
    ]


def cuda_rule(compiler, architectures):
    """Return the ninja rule for .cu files."""
    command = words([compiler, *nvcc.flags(architectures, COMPILE_FLAGS)])
    return [
        "rule cuda",
        f"  command = {command} $more -MMD -MF $out.d -c $in -o $out >$out.log 2>&1 "
        "|| { cat $out.log; exit 1; }; grep -w warning $out.log || :",
        "  depfile = $out.d",
        "  deps = gcc",
    ]


def told(source, why_not, architectures):
    """Return the macros of a source."""
    layout = f'-DLAYERLR_LAYOUT="{cuda_library.layout()}"'
    return {
        "csrc/bindings.cpp": [f'-DLAYERLR_NO_CUDA="{why_not}"'],
        "csrc/cuda/loader.cpp": [layout],
        "csrc/cuda/library.cu": [layout, f'-DLAYERLR_CUDA_ARCH="{";".join(architectures)}"'],
    }.get(source, [])


def build_files(torch, extensions):
    """Return each build.ninja by its folder: one object per source, one library per extension."""
    from torch.utils.cpp_extension import include_paths, library_paths

    standard = "c++20" if torch_version(torch) >= (2, 12) else "c++17"
    # As system headers, so that our warnings are ours alone.
    system = [f"-isystem{folder}" for folder in (*include_paths(), find_python_headers())]
    shared, own = rules(["-std=c++17"]), rules([f"-std={standard}", *system])
    there, here = folders(torch)
    compiler, why_not = nvcc.choose()
    architectures = nvcc.architectures(compiler) if compiler else []
    shared += cuda_rule(compiler, architectures) if compiler else []
    for extension in extensions:
        home = shared if extension.name == CUDA_LIBRARY else own
        objects = []
        for source in extension.sources:
            lines = shared if source.startswith(SHARED) else own
            parts, rule, folder = directions.parts(source), "compile", Path()
            if source.endswith(".cu"):
                parts = parts or {Path(source).stem: []}  # --objdir-as-tempdir wants its own folder
                rule, folder = "cuda", Path("-".join(["sm", *architectures]))
            for part, more in (parts or {"": []}).items():
                target = folder / part / f"{source}.o"
                more = [*isa_flags(source), *told(source, why_not, architectures), *more]
                lines.append(f"build {path(target)}: {rule} {path(ROOT / source)}")
                lines.append(f"  more = {words(more)}")
                objects.append(path(target if lines is home else there / target))
        if objects:
            # No rpath: layerlr imports torch, and with it these libraries, before its own.
            searched = extension.library_dirs if home is shared else library_paths()
            libraries = [f"-L{folder}" for folder in searched]
            libraries += [f"-l{name}" for name in extension.libraries]
            home.append(f"build {extension.name}.so: link {' '.join(objects)}")
            home.append(f"  libraries = {words([*libraries, *extension.extra_link_args])}")
    return {there: "\n".join(shared) + "\n", here: "\n".join(own) + "\n"}


class NinjaBuild(build_ext):
    """setuptools' build_ext with ninja in place of its compiler driver."""

    def get_ext_filename(self, name):
        """Return the file of an extension; the CUDA library is C++'s to open, not Python's."""
        if CUDA_LIBRARY.endswith(name):  # setuptools asks with the package and without
            return f"{name.replace('.', os.sep)}.so"
        return super().get_ext_filename(name)

    def run(self):
        """Build, and remove the CUDA library of an earlier build if this one makes none."""
        super().run()
        if CUDA_LIBRARY not in {extension.name for extension in self.extensions}:
            for folder in [self.build_lib, *([ROOT] if self.inplace else [])]:
                Path(folder, self.get_ext_filename(CUDA_LIBRARY)).unlink(missing_ok=True)

    def build_extensions(self):
        """Write each build.ninja, run it, put the libraries where setuptools wants them."""
        torch = find_torch()
        compiler, why_not = nvcc.choose()
        word = nvcc.ahead(compiler) if compiler else ""
        if why_not:
            word = f"the CUDA engine is left out: {why_not}"
        if word:
            print(f"layerlr: {word}", file=sys.stderr)
        program = find_ninja()
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        files = build_files(torch, self.extensions)
        there, here = folders(torch)
        there.mkdir(parents=True, exist_ok=True)
        import fcntl  # not on Windows, where find_compiler has stopped

        with open(there / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # builds for two Pythons take turns
            for folder, text in files.items():
                folder.mkdir(exist_ok=True)
                (folder / "build.ninja").write_text(text)
                if subprocess.run([program, "-C", folder, *jobs]).returncode:
                    stop(
                        "the native build failed; the compiler's messages are above. "
                        "LAYERLR_CUDA=0 leaves the CUDA kernels out."
                    )
            for extension in self.extensions:
                folder = there if extension.name == CUDA_LIBRARY else here
                (made,) = extension.extra_objects or [folder / f"{extension.name}.so"]
                target = Path(self.get_ext_fullpath(extension.name))
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(made, target)


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
