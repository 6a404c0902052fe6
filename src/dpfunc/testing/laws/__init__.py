"""Laws, as functions that raise AssertionError and say what broke them.

Each takes the function under test by keyword (`clip=`, `release=`, `draw=`, `epsilon=`), ours where none is
given, or first of all (`gradient`). Those that are statistics say how often they err.
"""

from dpfunc.testing.laws.accounting import (
    bounds_bracket,
    costs_add_up,
    counts_fold,
    epsilon_covers,
    epsilon_is_a_number,
    epsilon_is_monotone,
    logs_compose,
    relations_are_ordered,
)
from dpfunc.testing.laws.clipping import (
    clipping_is_idempotent,
    contribution,
    contribution_is_bounded,
    neighbours_are_close,
    norms_are_upper_bounds,
    replaced_neighbours_are_close,
    scales_keep_the_promise,
)
from dpfunc.testing.laws.exact import exact_norm
from dpfunc.testing.laws.gradients import (
    chunks_and_padding_agree,
    examples_are_apart,
    losses_contribution_is_bounded,
    methods_agree,
)
from dpfunc.testing.laws.noise import (
    noise_is_calibrated,
    noise_is_independent,
    numbers_follow,
    signal_is_kept,
    streams_are_independent,
)
from dpfunc.testing.laws.purity import compiles_alike, is_pure, keeps_no_graph
from dpfunc.testing.laws.sampling import (
    batches_are_whole,
    drawn_by,
    inclusion_is_independent,
)
from dpfunc.testing.laws.step import (
    blank,
    empty_batch_is_noise,
    event_tells_the_noise,
    noise_is_fresh,
    queries_are_one_event,
    release_is_the_mean,
    released_neighbours_are_close,
)
from dpfunc.testing.laws.sums import (
    duplicates_count_each,
    masked_rows_vanish,
    order_does_not_matter,
    poison_vanishes,
    sums_add_up,
)

__all__ = [
    "batches_are_whole",
    "blank",
    "bounds_bracket",
    "chunks_and_padding_agree",
    "clipping_is_idempotent",
    "compiles_alike",
    "contribution",
    "contribution_is_bounded",
    "costs_add_up",
    "counts_fold",
    "drawn_by",
    "duplicates_count_each",
    "empty_batch_is_noise",
    "epsilon_covers",
    "epsilon_is_a_number",
    "epsilon_is_monotone",
    "event_tells_the_noise",
    "exact_norm",
    "examples_are_apart",
    "inclusion_is_independent",
    "is_pure",
    "keeps_no_graph",
    "logs_compose",
    "losses_contribution_is_bounded",
    "masked_rows_vanish",
    "methods_agree",
    "neighbours_are_close",
    "noise_is_calibrated",
    "noise_is_fresh",
    "noise_is_independent",
    "norms_are_upper_bounds",
    "numbers_follow",
    "order_does_not_matter",
    "poison_vanishes",
    "queries_are_one_event",
    "relations_are_ordered",
    "release_is_the_mean",
    "released_neighbours_are_close",
    "replaced_neighbours_are_close",
    "scales_keep_the_promise",
    "signal_is_kept",
    "streams_are_independent",
    "sums_add_up",
]
