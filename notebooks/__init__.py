"""Notebooks, one for each question that a researcher asks, and what makes pages of them."""
