"""Package metadata. The core needs torch, numpy, numba, safetensors, click and rich; colossalai is an extra."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "([^"]+)"', (HERE / "colossal_freqcache" / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE
).group(1)
README = HERE / "README.md"

EXTRAS = {
    "colossalai": ["colossalai==0.5.0"],
    "data": ["pyarrow>=15", "pandas>=2.2"],
    "plot": ["matplotlib>=3.8"],
    "test": ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "pyarrow>=15"],
    "bench": ["fbgemm-gpu-cpu==1.0.0"],  # fits torch 2.5
    "dev": ["ruff==0.17.6"],
}
EXTRAS["dev"] += [*EXTRAS["test"], *EXTRAS["data"], *EXTRAS["plot"]]

setup(
    name="colossal_freqcache",
    version=VERSION,
    description="A frequency-aware cache for embedding tables larger than the memory of the device that trains them",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["colossal_freqcache", "colossal_freqcache.*"]),
    python_requires=">=3.11",
    install_requires=["torch>=2.5", "numpy>=2.0", "numba>=0.61", "rich>=13", "safetensors>=0.4.3", "click>=8"],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["colossal-freqcache = colossal_freqcache.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
