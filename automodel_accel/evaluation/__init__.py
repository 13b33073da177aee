"""Evaluation: what a model has learned, measured."""

from automodel_accel.evaluation.held_out import HeldOut, held_out_loss, takes_num_items

__all__ = ["HeldOut", "held_out_loss", "takes_num_items"]
