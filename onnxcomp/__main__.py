"""`python -m onnxcomp`: the command line, as `torchrun -m` needs it."""

from onnxcomp.cli import main

main()
