"""Plausible mistakes in what producers note of their output: each changes what is noted, none crashes or leaves its memory."""

from tests.ops.mutation import Mutant

KERNEL = "fp8_linear/noted_fused.py"
HOST = "fp8_linear/noted.py"
RMS_NORM = "rms_norm/fused.py"
ADD_RMS_NORM = "rms_norm/add_fused.py"
GATED_LINEAR = "gated_linear/fused.py"

IN_KERNEL = (
    Mutant(KERNEL, "magnitude(y)", "y.to(tl.int32, bitcast=True)", "the largest value, not the largest absolute one"),
    Mutant(KERNEL, "tl.where(in_row, magnitude(y), 0)", "magnitude(y)", "what is beside the row counts"),
    Mutant(KERNEL, "y = y.to(Y.dtype.element_ty).to(tl.float32)", "y = y", "before it is rounded"),
    Mutant(
        KERNEL, "scale_of(amax, EXPONENT, MANTISSA)", "scale_of(amax, EXPONENT + 1, MANTISSA)", "wraps or saturates"
    ),
    Mutant(KERNEL, "scale_of(amax, EXPONENT, MANTISSA)", "scale_of(amax, EXPONENT, 0)", "half of the range"),
    Mutant(KERNEL, "tl.store(SCALE + row, scale)", "tl.store(SCALE + row, inverse)", "the inverse for the scale"),
    Mutant(KERNEL, "(y * inverse)", "(y * scale)", "the scale for its inverse"),
)

IN_HOST_CODE = (
    Mutant(HOST, "written.amax.amax(1)", "written.amax[:, 0]", "the first tile of a row alone"),
    Mutant(
        HOST,
        "(note.address, note.version) == (x.data_ptr(), x._version)",
        "note.address == x.data_ptr()",
        "valid after a write",
    ),
    Mutant(
        HOST,
        "(note.address, note.version) == (x.data_ptr(), x._version)",
        "note.version == x._version",
        "valid for a copy",
    ),
    Mutant(HOST, "older.cast = None", "older.cast = older.cast", "every cast is kept"),
    Mutant(HOST, "_here.wish, _here.found = before", "_here.found = before[1]", "asked for behind the block"),
    Mutant(HOST, "found is not None and found.address == main.data_ptr()", "found is not None", "of something inside"),
    Mutant(HOST, ' or device == "cpu" or is_fast(this_machine().arch)', " or True", "a cast that does not compile"),
)

IN_PRODUCERS = (
    Mutant(RMS_NORM, "note_row(y, Y,", "note_row(y * rstd, Y,", "rms_norm: of something else"),
    Mutant(RMS_NORM, "    noted.leave(y_NH, notes)\n", "", "rms_norm: never handed over"),
    Mutant(ADD_RMS_NORM, "note_row(y, Y,", "note_row(h_wide, Y,", "add_rms_norm: of the sum"),
    Mutant(ADD_RMS_NORM, "noted.leave(y_NH, notes)", "noted.leave(h_NH, notes)", "add_rms_norm: noted on the sum"),
    Mutant(GATED_LINEAR, "note_row(y, Y,", "note_row(activated, Y,", "gated_linear: of the activation"),
    Mutant(GATED_LINEAR, "tile.to(tl.int64), n_cols, AMAX", "row * 0, n_cols, AMAX", "gated_linear: all in one row"),
    Mutant(
        GATED_LINEAR, "up_NF, y_NF) if wish is None else", "up_NF, y_NF) if True else", "gated_linear: one long row"
    ),
)

MUTANTS = (*IN_KERNEL, *IN_HOST_CODE, *IN_PRODUCERS)
