"""Programs that run inside test containers, by `python3 -u -m support.workloads.NAME`: stdlib and their layer alone."""
