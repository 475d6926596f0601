"""Figures, drawn from what runs left on disk; one module for each kind of measurement."""
