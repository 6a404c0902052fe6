"""Makes pld.json with dp-accounting, in an environment of its own: not a dependency here.

pip install dp-accounting==0.6.0
python make_pld.py
"""

import itertools
import json
from pathlib import Path

from dp_accounting.pld.privacy_loss_distribution import (
    from_gaussian_mechanism,
    from_laplace_mechanism,
)
from dp_accounting.privacy_accountant import NeighboringRelation

RELATIONS = {
    "add_or_remove_one": NeighboringRelation.ADD_OR_REMOVE_ONE,
    "replace_one": NeighboringRelation.REPLACE_ONE,
}
GRID = [  # relation, mechanism, noise multiplier, sampling probability, count
    *itertools.product(RELATIONS, ["gaussian"], [0.8, 2.0], [0.01, 0.2, 1.0], [1, 50, 1000]),
    *itertools.product(["add_or_remove_one"], ["laplace"], [1.0, 5.0], [0.05, 1.0], [1, 50]),
]
# From full batches a thousand times its optimistic epsilon is above the closed form: 903.35 at 902.44.
GRID = [case for case in GRID if not (case[3] == 1.0 and case[4] == 1000)]
DELTAS = [1e-3, 1e-6]


def law(relation, mechanism, noise, prob, count, pessimistic):
    how = {"sampling_prob": prob, "pessimistic_estimate": pessimistic}
    if mechanism == "laplace":
        one = from_laplace_mechanism(noise, value_discretization_interval=1e-4, **how)
    else:
        one = from_gaussian_mechanism(
            noise,
            value_discretization_interval=1e-4 if count > 1 else 1e-5,
            neighboring_relation=RELATIONS[relation],
            **how,
        )
    return one.self_compose(count)


rows = []
for case in GRID:
    least, most = (
        [law(*case, pessimistic).get_epsilon_for_delta(delta) for delta in DELTAS]
        for pessimistic in (False, True)
    )
    names = ("relation", "mechanism", "noise_multiplier", "sampling_prob", "count")
    rows.append(dict(zip(names, case, strict=True)) | {"optimistic": least, "pessimistic": most})

path = Path(__file__).with_name("pld.json")
path.write_text(json.dumps({"deltas": DELTAS, "rows": rows}, indent=1) + "\n")
