"""The compiled part of the package; everything else is in pyproject.toml, which cannot say this."""

from setuptools import setup  # type: ignore[import-untyped, unused-ignore]

setup(
    cffi_modules=["native/rewarm_native/_build.py:ffibuilder", "native/rewarm_native/_build.py:cuda"],
    # cffi keeps to the stable ABI of its own accord; the wheel has to say so, too.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
