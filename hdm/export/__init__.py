"""Trained networks in the forms that other programs read: `python -m hdm.export`."""
