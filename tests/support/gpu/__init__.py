"""What tests/gpu and bench/gpu.py share: the machine with the GPU, its containers, and the driver's own calls."""
