"""Our GPU kernels, in Triton, which is imported at the first use only."""
