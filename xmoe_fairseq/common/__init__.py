"""Means that every part of the package uses: files, locks, schemas, one-line errors, names of directions."""
