"""Readers of published data sets: a raw record in, the fields of data.Example out."""
