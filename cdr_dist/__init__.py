"""Distributed cross-domain recommendation."""
