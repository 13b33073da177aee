"""Recipes: what one run is, as dataclasses filled from YAML."""
