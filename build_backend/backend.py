"""Build backend: setuptools, plus the torch of the environment that is being installed into.

``pip install .`` builds in an isolated environment. Listing torch there would download a second
one, of another version, and compile against its ABI. But the isolated build still runs the target
environment's interpreter, so the torch that layerlr will run with can be found and used.
"""

import importlib.util
import site
import sys
from pathlib import Path

from setuptools import build_meta

# These two need no torch.
from setuptools.build_meta import build_sdist, get_requires_for_build_sdist

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

NO_TORCH = (
    "layerlr is built against the PyTorch it will run with, and this environment has none. "
    "Install PyTorch first (https://pytorch.org), then repeat; if it is installed and not found: "
    "pip install 'setuptools>=77' ninja && pip install --no-build-isolation ."
)


def target_folders():
    """Return the package folders of the interpreter that runs the build, isolation ignored."""
    folders = site.getsitepackages()
    if sys.prefix == sys.base_prefix:  # a virtual environment does not see the user's folder
        folders.append(site.getusersitepackages())
    return folders


def expose_torch():
    """Make ``import torch`` work in this process, or stop with a sentence saying what to do."""
    if importlib.util.find_spec("torch"):
        return
    for folder in target_folders():
        if Path(folder, "torch", "version.py").is_file():
            sys.path.append(folder)  # last: the isolated environment's own packages still win
            return
    raise SystemExit(NO_TORCH)


# Each hook below stops without torch, the metadata ones too: they run first in a build without
# isolation, where pip would otherwise download layerlr's requirements before it builds.
def get_requires_for_build_wheel(config_settings=None):
    """Return setuptools' extra requirements (none) for a wheel."""
    expose_torch()
    return build_meta.get_requires_for_build_wheel(config_settings)


def get_requires_for_build_editable(config_settings=None):
    """Return setuptools' extra requirements (none) for an editable install."""
    expose_torch()
    return build_meta.get_requires_for_build_editable(config_settings)


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    """Write the .dist-info folder of a wheel."""
    expose_torch()
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    """Write the .dist-info folder of an editable install."""
    expose_torch()
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """Build a wheel."""
    expose_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    """Build the native extension in place and a wheel that points at the source tree."""
    expose_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
