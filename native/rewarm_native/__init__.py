"""rewarm's C as Python: what the kernel offers and Python's own modules do not.

Knows nothing of containers or snapshots. Importing the package is free; `rewarm_native.process` loads the
compiled module.
"""
