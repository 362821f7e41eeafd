"""Builds the two op libraries and the pybind11 module with CMake and puts them into the package.

Environment: MOE_EXT_CUDA (auto, 1, 0), MOE_EXT_CUDA_ARCHS ("80;90a"), MAX_JOBS.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "cmake"))

import build_checks  # noqa: E402

LIBRARIES = ("libmoe_ext.so", "libmoe_ext_cuda.so")


class CMakeBuild(build_ext):
    """One CMake run makes all three libraries; the Extension stands for all of them."""

    def build_extension(self, extension: Extension) -> None:
        with_cuda = build_checks.check(os.environ)
        environment = {**os.environ, "PATH": build_checks.tool_path(os.environ)}
        # Not self.build_temp, which pip throws away: a second build compiles only what changed.
        build = ROOT / "build" / f"{sys.implementation.cache_tag}-{'cuda' if with_cuda else 'cpu'}"
        archs = os.environ.get("MOE_EXT_CUDA_ARCHS", "80;90a").replace(",", ";")
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DMOE_EXT_PYTHON={sys.executable}",
            f"-DMOE_EXT_OUTPUT_DIR={build / 'lib'}",
            f"-DMOE_EXT_VERSION={self.distribution.get_version()}",
            f"-DMOE_EXT_CUDA={'ON' if with_cuda else 'OFF'}",
            f"-DMOE_EXT_CUDA_ARCHS={archs}",
        ]
        subprocess.run(configure, check=True, env=environment)
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.run(["cmake", "--build", str(build), "-j", jobs], check=True, env=environment)
        self.copy_libraries(build / "lib", Path(self.get_ext_fullpath(extension.name)).resolve())

    def copy_libraries(self, source: Path, host_module: Path) -> None:
        """Puts what was built beside the module, and removes what an earlier build left there."""
        host_module.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / host_module.name, host_module)
        for name in LIBRARIES:
            (host_module.parent / name).unlink(missing_ok=True)
            if (source / name).exists():
                shutil.copy2(source / name, host_module.parent / name)

    def copy_extensions_to_source(self) -> None:
        """For editable installs: setuptools would copy the pybind11 module only."""
        # By now get_ext_fullpath names the source folder; what was built lies in build_lib.
        module = Path(self.get_ext_filename("moe_ext._host"))
        self.copy_libraries(Path(self.build_lib).resolve() / "moe_ext", ROOT / "python" / module)


setup(ext_modules=[Extension("moe_ext._host", sources=[])], cmdclass={"build_ext": CMakeBuild})
