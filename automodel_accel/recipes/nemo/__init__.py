"""NeMo Automodel's recipes, translated."""

from automodel_accel.recipes.nemo.contract import Note, Translation
from automodel_accel.recipes.nemo.translation import is_theirs, parse_theirs, read_theirs, translate

__all__ = ["Note", "Translation", "is_theirs", "parse_theirs", "read_theirs", "translate"]
