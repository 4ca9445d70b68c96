"""Published architectures, written out small from their papers' descriptions."""
