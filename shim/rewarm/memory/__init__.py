"""Memory that rewarm, not CRIU, brings back: where each chunk goes, and writing it there.

Nothing is imported here: a restore pays only for the modules that it uses.
"""
