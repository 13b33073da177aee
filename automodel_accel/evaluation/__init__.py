"""Evaluation: what a model has learned, measured."""

from automodel_accel.evaluation.choices import Accuracy, Question, multiple_choice, questions_of
from automodel_accel.evaluation.held_out import HeldOut, held_out_loss, takes_num_items

__all__ = [
    "Accuracy",
    "HeldOut",
    "Question",
    "held_out_loss",
    "multiple_choice",
    "questions_of",
    "takes_num_items",
]
