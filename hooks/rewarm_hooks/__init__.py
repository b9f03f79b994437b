"""What runs as an OCI hook: the changes of a container's root filesystem as an OCI image layer, and the device map.

Standard library only, and nothing of rewarm itself. A hook stands in the path of every restore, so what the hooks
import is kept small: no dataclasses, pathlib, typing, argparse or tarfile at run time (each costs more than a tiny
diff does).

Public: `rewarm_hooks.layer` (write_layer, apply_layer, undo_layer, LayerError, LayerStats) and the two commands
`python3 -I -m rewarm_hooks.rootfs_diff` and `python3 -I -m rewarm_hooks.device_remap`.
"""
