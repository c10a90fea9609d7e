"""Thin, named layers over well-kept libraries."""
