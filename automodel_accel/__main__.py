"""python -m automodel_accel: the command line."""

from automodel_accel.cli import main

main()
