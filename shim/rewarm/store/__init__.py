"""The store: snapshots as manifests and content-addressed packs in a directory. Format: docs/store.md.

Nothing is imported here: a restore pays only for the modules that it reads with.
"""
