"""The OCI side: runc's command line, config.json, the low-level runtime and rewarm's record of each container."""
