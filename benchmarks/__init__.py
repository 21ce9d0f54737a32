"""Benchmarks of onnxcomp, on its public API only: `python -m benchmarks NAME`."""
