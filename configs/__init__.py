"""One file a (data set, model); the variant comes after a colon: ``digits.py:w2a2``."""
