"""Budgets: what the kernels and the models cost, counted without a GPU, against figures.json, which may only improve."""
