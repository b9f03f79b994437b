"""Helpers of the integration tests: real runc, containerd and CRIU, with nothing left behind."""
