"""HTTP in front of an `Engine`: routes translate requests and `Delta`s, nothing here computes.

`run.serve` is the way in. Only `cli` and `bench` import this package.
"""
