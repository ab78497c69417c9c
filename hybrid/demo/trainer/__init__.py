"""MuonClip training of a small model of K2's architecture, on CPUs through compiled kernels or on a GPU."""
