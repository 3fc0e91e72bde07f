"""Mutated inputs of every kind that a user can give, and whether each is answered rightly.

A target makes sound inputs once, then mutates one in each case, gives it to the package, and judges
what comes back by an oracle of its own. ``tools/fuzz.py`` runs thousands of cases, the tests a few.
"""
