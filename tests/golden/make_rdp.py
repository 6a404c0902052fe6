"""Write rdp.json: Renyi divergences and epsilons of other libraries.

Run in an environment of its own: pip install dp-accounting==0.6.0 opacus==1.6.0
(dp-accounting asks for older packages than the project's tools do.)

Order lists are whole numbers for dp-accounting, because at fractional orders it sums the absolute
values of a signed series: an upper bound there, up to a third above. Opacus sums the signed series.
"""

import json
from importlib.metadata import version
from pathlib import Path

from dp_accounting import dp_event
from dp_accounting.rdp.rdp_privacy_accountant import RdpAccountant
from opacus.accountants.analysis.rdp import compute_rdp

# noise_multiplier, sampling_prob, count, delta
LOGS = [
    (1.1, 0.00427, 14062, 1e-5), (1.3, 0.004, 3750, 1e-5), (0.7, 0.004, 11250, 1e-5),
    (4, 0.01, 10000, 1e-5), (1, 0.01, 1000, 1e-5), (1, 0.01, 10000, 1e-5), (0.5, 0.01, 1000, 1e-5),
    (8, 0.01, 10000, 1e-5), (2, 0.01, 1, 1e-5), (1, 0.1, 100, 1e-5), (2, 0.1, 1000, 1e-5),
    (8, 0.1, 1000, 1e-5), (0.6, 0.001, 10000, 1e-6), (1, 0.001, 100000, 1e-6),
    (8, 0.001, 100000, 1e-6), (1, 0.001, 100, 1e-8), (4, 0.001, 1000, 1e-5),
    (0.5, 1e-4, 100000, 1e-6), (1, 1e-4, 100000, 1e-6), (4, 1e-4, 100000, 1e-8), (1, 1, 1, 1e-5),
    (8, 1, 100, 1e-5), (100, 1, 1000, 1e-5), (1, 0.01, 1000, 1e-12), (2, 0.5, 500, 1e-5),
    (0.3, 0.01, 100, 1e-5), (3, 0.3, 150, 1e-5),
]  # fmt: skip
WHOLE = [float(a) for a in (*range(2, 65), 128, 256, 512, 1024)]
FRACTIONAL = [1.1, 1.7, 2.5, 3.3, 5.5, 10.9]


def event(noise, prob):
    gaussian = dp_event.GaussianDpEvent(noise)
    return gaussian if prob == 1 else dp_event.PoissonSampledDpEvent(prob, gaussian)


def row(noise, prob, count, delta):
    composed = dp_event.SelfComposedDpEvent(event(noise, prob), count)
    whole, default = RdpAccountant(WHOLE), RdpAccountant()
    whole.compose(composed)
    default.compose(composed)
    fractional = compute_rdp(q=prob, noise_multiplier=noise, steps=1, orders=FRACTIONAL)
    return {
        "noise_multiplier": noise, "sampling_prob": prob, "count": count, "delta": delta,
        "rdp_whole_orders": [float(v) for v in whole._rdp],
        "epsilon_whole_orders": whole.get_epsilon(delta),
        "epsilon_default_orders": default.get_epsilon(delta),
        "opacus_rdp_fractional_orders": [float(v) for v in fractional],
    }  # fmt: skip


table = {
    "tools": {name: version(name) for name in ("dp-accounting", "opacus")},
    "command": "python tests/golden/make_rdp.py",
    "whole_orders": WHOLE,
    "fractional_orders": FRACTIONAL,
    "rows": [row(*log) for log in LOGS],
}
Path(__file__).with_name("rdp.json").write_text(json.dumps(table, indent=1) + "\n")
