"""A fixture for refactors: hashes of what today's code computes, which tomorrow's has to reproduce bit for bit.

python -m tests.golden make DIR     # before the first change: hashes and ten checkpoints
python -m tests.golden check DIR    # after it, on the same machine: what differs; exit status 1 if anything does

A case is "setting|subject|scheme|what": with the native library or the reference; a published architecture, operator or
checkpoint; how it was quantized; and what is hashed: outputs (of an instruction set and a number of threads), state,
figures.
"""
