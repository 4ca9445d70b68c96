"""Notebooks, and the word language model that they share with `make demo`, the benchmark and the tests."""
