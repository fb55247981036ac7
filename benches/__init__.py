"""Benchmarks: every figure a ratio against a physical limit or a peer, measured alternately in the same run."""
