"""The passes, one a file: trace, fuse, plan, observe, convert, clean."""
