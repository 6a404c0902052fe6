"""The house: imports point down, accounting and the command line are free of torch, one wheel."""

import ast
import importlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dpfunc

ROOT = Path(dpfunc.__file__).parent
FLOORS = {
    0: {"typing", "_checks", "_chacha20"},
    1: {"random", "trees", "events", "schedules"},
    2: {"mechanism"},
    3: {"sampling", "gradients", "noise", "accounting"},
    4: {"optimizers", "models", "telemetry"},
    5: {"step"},
    6: {"audit", "training", "digits", "plots"},
    7: {"cli", "testing"},
}
FLOOR = {room: floor for floor, rooms in FLOORS.items() for room in rooms}


def room_of(path):
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imported_rooms(source):
    """Rooms that a file imports, also inside its functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for name in node.names:
                if name.name.startswith("dpfunc."):
                    yield name.name.split(".")[1]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dpfunc":
            assert node.level == 0
            parts = node.module.split(".")
            if len(parts) > 1:
                yield parts[1]
            else:
                yield from (name.name for name in node.names if name.name in FLOOR)


def violations(room, source):
    return [
        other for other in imported_rooms(source) if other != room and FLOOR[other] >= FLOOR[room]
    ]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down_or_stay_in_their_room(path):
    if path == ROOT / "__init__.py":
        return
    assert room_of(path) in FLOOR, "every file has a floor"
    assert violations(room_of(path), path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "from dpfunc.step import make_dp_step",
        "import dpfunc.cli",
        "from dpfunc import optimizers",
        "def f():\n    from dpfunc.noise import privatize",
    ],
)
def test_an_upward_or_sideways_import_is_seen(source):
    assert violations("gradients", source)


@pytest.mark.parametrize(
    "code",
    [
        "import dpfunc; dpfunc.epsilon, dpfunc.StepEvent, dpfunc.calibrate_noise_multiplier",
        "import dpfunc.accounting",
        "import dpfunc.cli; dpfunc.cli.main(['calibrate', '--target-epsilon', '3', '--delta', '1e-5',"
        " '--sampling-prob', '0.01', '--num-steps', '100'])",
        "import dpfunc.cli; dpfunc.cli.main(['epsilon', '--noise-multiplier', '1', '--delta', '1e-5',"
        " '--sampling-prob', '0.01', '--num-steps', '100'])",
    ],
)
def test_accounting_and_the_command_line_import_no_torch_and_little_of_scipy(code):
    code += "\nimport sys"
    unwanted = ["torch", "scipy.optimize", "scipy.interpolate", "scipy.fft", "matplotlib"]
    if "calibrate'" not in code:  # which takes its first guess from closed forms
        unwanted.append("scipy.special")
    for name in unwanted:
        code += f"\nassert {name!r} not in sys.modules, '{name} was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE)


def test_every_public_name_is_there_and_has_a_docstring():
    assert dir(dpfunc) == sorted(dpfunc.__all__)
    for name in dpfunc.__all__:
        value = getattr(dpfunc, name)
        assert name.startswith("__") or value.__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        dpfunc.nonsense


SECTIONS = ("Args:", "Returns:", "Guarantees:", "Raises:", "Source:", ">>>")


@pytest.mark.parametrize(
    "name",
    [
        "append",
        "account_as",
        "average_over_augmentations",
        "combined_noise_multiplier",
        "make_accumulator",
        "in_place",
        "noise_multiplier_beside",
        "observe",
        "AdaptiveClipping",
        "AutomaticClipping",
        "ClipFraction",
        "CustomClipping",
        "L1Clipping",
        "MeanLoss",
        "NormQuantile",
        "PerGroupClipping",
        "PerSampleAdaptiveClipping",
        "clip_and_noise",
        "clip_and_sum",
        "clipped_grad",
        "functional_loss",
        "make_dp_step",
        "make_train_step",
        "per_sample_grads",
        "overflow_probability",
        "poisson_batches",
        "poisson_indices",
        "private_grad",
        "delta",
        "epsilon",
        "gaussian_delta",
        "gaussian_epsilon",
        "delta_bounds",
        "epsilon_bounds",
        "privacy_profile",
        "trade_off",
        "attack_advantage",
        "posterior_odds",
        "gdp_summary",
        "remaining",
        "selection_epsilon",
        "Repeats",
        "calibrate_noise_multiplier",
        "calibrate_num_steps",
        "calibrate_sampling_prob",
        "write_log",
        "read_log",
        "read_run",
        "verify_log",
        "LogFile",
        "Header",
        "Statement",
        "DPSGD",
        "StepEvent",
        "audit_step",
        "audit.marked_loss",
        "audit.gradient_canaries",
        "audit.clopper_pearson",
        "audit.gaussian_fit",
        "audit.accuracy_bound",
        "audit.independent_runs",
        "audit.one_run",
        "audit.one_run_curve",
        "audit.one_run_p_value",
        "audit.one_run_refutes",
        "random.key",
        "random.split",
        "random.fold_in",
        "random.bits",
        "random.uniform",
        "random.normal",
        "random.laplace",
        "optimizers.sgd",
        "optimizers.adam",
        "optimizers.adamw",
        "optimizers.adam_bc",
        "optimizers.chain",
        "optimizers.ema",
        "optimizers.averaged",
        "optimizers.disk",
        "optimizers.exponential_decay",
        "optimizers.step_decay",
        "optimizers.cosine_decay",
        "optimizers.from_torchopt",
        "optimizers.write_grads",
    ],
)
def test_docstrings_have_their_sections_in_order(name):
    value = dpfunc
    for part in name.split("."):
        value = getattr(value, part)
    text = value.__doc__
    places = [text.find(section) for section in SECTIONS]
    found = [place for place in places if place >= 0]
    assert found == sorted(found)
    assert "Guarantees:" in text
    assert "Raises:" in text
    assert ">>>" in text


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    project = ROOT.parents[1]
    if not (project / "pyproject.toml").exists():
        pytest.skip("runs from the source tree")
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=project, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_nothing_but_the_package(wheel):
    names = wheel.namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"dpfunc", f"dpfunc-{dpfunc.__version__}.dist-info"}
    assert "dpfunc/py.typed" in names
    metadata = wheel.read(f"dpfunc-{dpfunc.__version__}.dist-info/METADATA").decode()
    requirements = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    core = [line for line in requirements if "extra ==" not in line]
    assert len(core) == 5
    assert all(">=" in line and "==" not in line for line in core)


# The installed script, but where torch cannot be imported.
SCRIPT = """
import sys
folder = sys.argv.pop(1)
sys.path.insert(0, folder)
sys.modules["torch"] = None
from importlib.metadata import Distribution
from pathlib import Path
distribution = Distribution.at(next(Path(folder).glob("*.dist-info")))
(script,) = distribution.entry_points.select(group="console_scripts", name="dpfunc")
main = script.load()
import dpfunc
assert Path(dpfunc.__file__).is_relative_to(folder)
sys.exit(main())
"""


def test_the_command_line_of_the_wheel_works_where_torch_cannot_be_imported(wheel, tmp_path):
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target"]
    subprocess.run([*install, tmp_path / "site", wheel.filename], check=True, capture_output=True)
    assert (tmp_path / "site" / "bin" / "dpfunc").exists()

    def dpfunc_(*words):
        command = [sys.executable, "-I", "-c", SCRIPT, str(tmp_path / "site"), *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        return done.returncode, done.stdout, done.stderr

    numbers = ["--noise-multiplier", "1", "--sampling-prob", "0.01", "--num-steps", "1000"]
    assert dpfunc_("epsilon", *numbers, "--delta", "1e-5") == (0, "1.82824\n", "")
    dpfunc.write_log(tmp_path / "log", ())
    code, said, _ = dpfunc_("verify", "log")
    assert (code, "log is whole" in said) == (0, True)
    code, said, _ = dpfunc_("statement", "--log", "log", "--delta", "1e-5", "--json")
    assert (code, '"epsilon": 0.0' in said) == (0, True)
    (tmp_path / "log").write_bytes((tmp_path / "log").read_bytes()[:-1])
    code, said, _ = dpfunc_("verify", "log")
    assert (code, "FAILS at line 2" in said) == (3, True)
    code, _, error = dpfunc_("delta", *numbers)
    assert (code, error.count("\n")) == (2, 1)


def test_modules_import_in_any_order():
    for room in FLOOR:
        if room != "plots":
            importlib.import_module(f"dpfunc.{room}")
