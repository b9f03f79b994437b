"""The compiled part of the package; everything else is in pyproject.toml, which cannot say this."""

from setuptools import setup  # type: ignore[import-untyped, unused-ignore]

setup(cffi_modules=["native/rewarm_native/_build.py:ffibuilder", "native/rewarm_native/_build.py:cuda"])
