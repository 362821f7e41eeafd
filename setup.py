"""Builds the two op libraries and the pybind11 module with CMake and puts them into the package."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """One CMake run makes all three libraries; the Extension stands for all of them."""

    def build_extension(self, extension: Extension) -> None:
        output = Path(self.get_ext_fullpath(extension.name)).resolve().parent
        # Not self.build_temp, which pip throws away: a second build compiles only what changed.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        output.mkdir(parents=True, exist_ok=True)
        with_cuda = wants_cuda()
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DMOE_EXT_PYTHON={sys.executable}",
            f"-DMOE_EXT_OUTPUT_DIR={output}",
            f"-DMOE_EXT_VERSION={self.distribution.get_version()}",
            f"-DMOE_EXT_CUDA={'ON' if with_cuda else 'OFF'}",
            f"-DMOE_EXT_CUDA_ARCHS={os.environ.get('MOE_EXT_CUDA_ARCHS', '80;90a')}",
        ]
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(["cmake", "--build", str(build), "-j", jobs], check=True)

    def copy_extensions_to_source(self) -> None:
        """For editable installs: setuptools would copy the pybind11 module only."""
        for library in (Path(self.build_lib).resolve() / "moe_ext").glob("*.so"):
            shutil.copy2(library, ROOT / "python" / "moe_ext" / library.name)


def wants_cuda() -> bool:
    """MOE_EXT_CUDA=1 forces the CUDA build, 0 switches it off; else it follows a GPU and nvcc being there."""
    forced = os.environ.get("MOE_EXT_CUDA", "auto").lower()
    if forced in ("1", "on"):
        return True
    if forced in ("0", "off"):
        return False
    import torch

    return bool(shutil.which("nvcc")) and torch.cuda.is_available()


setup(ext_modules=[Extension("moe_ext._host", sources=[])], cmdclass={"build_ext": CMakeBuild})
