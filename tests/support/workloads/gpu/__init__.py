"""Programs that use a GPU, one small case each; `python3 -m support.workloads.gpu.NAME` serves it."""
