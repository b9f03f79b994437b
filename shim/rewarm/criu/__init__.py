"""CRIU: which one, its option file, its image files, its logs, and what it loses on the way."""
