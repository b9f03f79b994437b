"""GPUs: whose memory is moved, by which driver calls, and which GPU of this node stands for which of the snapshot's."""
