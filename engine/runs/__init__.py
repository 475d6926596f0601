"""Run directories: identity, files, lock, provenance, and the measurements made on them."""
