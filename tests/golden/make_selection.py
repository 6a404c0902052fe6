"""Makes selection.json with dp-accounting, in an environment of its own: not a dependency here.

pip install dp-accounting==0.6.0
python make_selection.py
"""

import json
import math
from pathlib import Path

import dp_accounting
import numpy as np
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant
from dp_accounting.rdp.rdp_privacy_accountant import _gamma_truncated_negative_binomial

# Where batches are sampled, fractional orders of dp-accounting are upper bounds with a slack.
FRACTIONAL = [float(a) for a in 1 + np.geomspace(0.02, 0.98, 30)]
WHOLE = [*range(2, 65), *(int(a) for a in np.unique(np.geomspace(66, 4096, 60).astype(int)))]
SHOWN = [2, 5, 16, 64]
RUNS = [  # noise multiplier, sampling probability, count, delta
    (1.0, 1.0, 1, 1e-5),
    (10.0, 1.0, 50, 1e-6),
    (2.0, 0.01, 1000, 1e-5),
    (1.1, 256 / 60000, 14062, 1e-5),
    (4.0, 0.1, 300, 1e-8),
]
REPEATS = [(1.5, 0.0), (20.0, 0.0), (20.0, 0.5), (20.0, 1.0), (300.0, 1.0), (20.0, math.inf)]

rows = []
for noise, prob, count, delta in RUNS:
    one = dp_event.GaussianDpEvent(noise)
    if prob < 1:
        one = dp_event.PoissonSampledDpEvent(prob, one)
    run = dp_event.SelfComposedDpEvent(one, count)
    for expected_runs, shape in REPEATS:
        accountant = RdpAccountant(WHOLE if prob < 1 else FRACTIONAL + WHOLE)
        accountant.compose(dp_event.RepeatAndSelectDpEvent(run, expected_runs, shape))
        orders, rdp = list(accountant._orders), accountant._rdp
        rows.append(
            {
                "noise_multiplier": noise,
                "sampling_prob": prob,
                "count": count,
                "delta": delta,
                "expected_runs": expected_runs,
                "shape": "inf" if math.isinf(shape) else shape,
                "stop_prob": None
                if math.isinf(shape)
                else _gamma_truncated_negative_binomial(shape, expected_runs),
                "rdp": [float(rdp[orders.index(order)]) for order in SHOWN],
                "epsilon": float(accountant.get_epsilon(delta)),
            }
        )

version = getattr(dp_accounting, "__version__", "0.6.0")
data = {"source": f"dp-accounting {version}", "shown_orders": SHOWN, "rows": rows}
Path(__file__).with_name("selection.json").write_text(json.dumps(data, indent=1) + "\n")
