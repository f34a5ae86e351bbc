"""An estimate of the time of the GPU kernels from counts of their code. No GPU has checked it: docs/gpu.md."""
