"""Benchmarks of ops and of whole training steps."""
