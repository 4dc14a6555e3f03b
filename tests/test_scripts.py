"""The scripts of a contributor: which tests are quick, how large the code is, what a set-up shows."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = '''"""A module
of two lines."""

# a comment
LIMIT = 3  # behind code
"""What it is."""


def grow(value):
    """Add."""
    return value + LIMIT
'''


CHECKOUT = {
    "src/cmt_edge/__init__.py": "if TYPE_CHECKING:\n    from .export.pipeline import run as export\n",
    "cmt/__init__.py": "from .layers import scaled\n",
    "cmt/layers.py": "",
    "deploy/__init__.py": "",
    "deploy/files.py": "",
    "deploy/bundle/__init__.py": "",
    "deploy/bundle/writer.py": "from ..files import seal\n",
    "deploy/backends/__init__.py": "TABLE = ('.fake', '..files')\n",
    "deploy/backends/fake.py": "",
    "export/__init__.py": "",
    "export/pipeline.py": "def run():\n    from cmt_edge.deploy.bundle import writer\n",
    "tests/conftest.py": "@pytest.fixture\ndef bundle():\n    import cmt_edge.export.pipeline\n",
    "tests/helpers/__init__.py": "",
    "tests/helpers/tables.py": "from cmt_edge.cmt import scaled\nDATA = ROOT / 'jetson'\n",
    "tests/test_alone.py": "import json\n",
    "tests/test_door.py": "from cmt_edge import export\n",
    "tests/test_fixture.py": "def test_it(bundle):\n    pass\n",
    "tests/deploy/test_table.py": "from cmt_edge.deploy.backends import TABLE\n",
    "tests/deploy/test_tables.py": "from helpers.tables import DATA\n",
    "tests/deploy/test_gpu.py": "def test_it(gpu_machine):\n    pass\n",
    "tests/deploy/test_writer.py": "import cmt_edge.deploy.bundle.writer\n",
}
"""A small checkout: path -> text."""


@pytest.fixture
def related(script, tmp_path):
    """A function from changed files of ``CHECKOUT`` to its related test modules and their distances."""
    for name, text in CHECKOUT.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for room in ("cmt", "deploy", "export"):
        (tmp_path / "src" / "cmt_edge" / room).symlink_to(tmp_path / room, target_is_directory=True)
    quick = script("quick_tests")
    sources = quick.read_sources(tmp_path)

    def find(*changed: str) -> dict[str, int]:
        steps = quick.measure_distances([Path(name) for name in changed], sources)
        return {Path(name).stem.removeprefix("test_"): distance for name, distance in steps.items()}

    return find


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ("tests/test_alone.py", {"alone": 0}),
        ("deploy/bundle/writer.py", {"writer": 1, "door": 2, "fixture": 3}),
        ("deploy/files.py", {"writer": 2, "table": 2, "door": 3, "fixture": 4}),
        ("deploy/backends/fake.py", {"table": 2}),
        ("cmt/layers.py", {"tables": 2}),
        ("tests/helpers/tables.py", {"tables": 1}),
        ("tests/data/jetson/orin.txt", {"tables": 2}),
        ("tests/fakes/cuda/__init__.py", {"gpu": 1}),
        ("README.md", {}),
    ],
)
def test_a_change_reaches_tests_through_imports(related, changed, expected):
    assert related(changed) == expected


def test_what_runs_before_a_module_matters_if_it_changes_itself(related):
    every = {Path(name).stem.removeprefix("test_") for name in CHECKOUT if "/test_" in name}
    assert set(related("tests/conftest.py")) == every
    assert related("deploy/bundle/__init__.py")["writer"] == 1
    assert "alone" not in related("deploy/__init__.py")


def test_a_change_chooses_tests_of_this_checkout(script):
    quick = script("quick_tests")
    sources = quick.read_sources(ROOT)
    assert quick.choose([], sources, {}) == (list(quick.ALWAYS), [])
    assert all((ROOT / name).exists() for name in quick.ALWAYS)
    steps = quick.measure_distances([Path("deploy/tensorrt/cuda.py")], sources)
    assert steps["tests/deploy/test_cuda.py"] == 1
    assert steps["tests/deploy/test_build.py"] > 1
    assert steps["tests/cmt/test_cvt.py"] > steps["tests/deploy/test_build.py"]
    assert "tests/test_docs.py" not in steps


@pytest.mark.parametrize("change", ["export/settings.py", "deploy/lifetimes.py", "docs/cli.md", "README.md"])
def test_tests_that_read_the_files_of_the_checkout_always_run(script, change):
    quick = script("quick_tests")
    chosen, _ = quick.choose([Path(change)], quick.read_sources(ROOT), {}, budget=0)
    readers = {"tests/test_code_style.py", "tests/test_docs.py", "tests/export/test_cli_reference.py"}
    assert readers <= set(chosen)


def test_near_and_short_tests_run_while_there_is_time(script):
    quick = script("quick_tests")
    sources = quick.read_sources(ROOT)
    change = [Path("deploy/tensorrt/cuda.py"), Path("tests/cmt/test_cvt.py")]
    steps = quick.measure_distances(change, sources)
    seconds = dict.fromkeys(steps, 10.0) | dict.fromkeys(quick.ALWAYS, 0.0)
    seconds |= {"tests/cmt/test_cvt.py": 25.0, "tests/deploy/test_cuda.py": 9.0}
    chosen, left_out = quick.choose(change, sources, seconds, budget=36.0)
    added = set(chosen) - set(quick.ALWAYS)
    assert added == {"tests/cmt/test_cvt.py", "tests/deploy/test_cuda.py"}
    assert set(left_out) == set(steps) - added - set(quick.ALWAYS)
    everything, nothing = quick.choose(change, sources, seconds, budget=1e9)
    assert (set(everything), nothing) == (set(steps) | set(quick.ALWAYS), [])
    assert "tests/cmt/test_cvt.py" in quick.choose(change, sources, seconds, budget=0)[0]


def test_changed_tests_run_first_and_near_ones_before_far_ones(script):
    quick = script("quick_tests")
    sources = quick.read_sources(ROOT)
    change = [Path("deploy/tensorrt/cuda.py"), Path("tests/cmt/test_cvt.py")]
    steps = quick.measure_distances(change, sources)
    chosen, _ = quick.choose(change, sources, {}, budget=1e9)
    assert chosen[: 1 + len(quick.ALWAYS)] == ["tests/cmt/test_cvt.py", *quick.ALWAYS]
    others = [steps[name] for name in chosen[1 + len(quick.ALWAYS) :]]
    assert others == sorted(others)


def test_no_test_starts_after_the_deadline(script, monkeypatch):
    deadline = script("quick_deadline")
    deadline.pytest_runtest_setup()
    monkeypatch.setattr(deadline, "START", deadline.START - deadline.LIMIT_S)
    with pytest.raises(pytest.skip.Exception, match="make test runs this test"):
        deadline.pytest_runtest_setup()


def test_what_is_left_out_is_said_on_standard_error(script, capsys, monkeypatch):
    quick = script("quick_tests")
    monkeypatch.setattr(quick, "changed_files", lambda base: [Path("deploy/errors.py")])
    assert quick.main(["--budget", "0"]) == 0
    out, err = capsys.readouterr()
    assert out.split() == list(quick.ALWAYS)
    assert "related test modules (make test runs them):" in err
    assert "  tests/deploy/test_cache.py" in err.splitlines()


def test_processor_time_is_recorded_by_module(script, tmp_path):
    code = (
        "import quick_tests as q; q.ROOT = q.Path.cwd(); q.RECORD = q.ROOT / 'record.json'; "
        "print(q.read_record()); print(q.main(['--record'])); print(q.main(['--record', 'test_short.py'])); "
        "print(q.read_record())"
    )
    spin = "def test_it(): [None for _ in range(10**7)]\n"
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n    giant\n")
    (tmp_path / "test_long.py").write_text(spin + spin.replace("it", "that"))
    (tmp_path / "test_short.py").write_text("def test_it(): pass\n")
    env = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    out = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, env=env, text=True)
    first, *_, last = out.splitlines()
    seconds = ast.literal_eval(last)
    assert first == "{}"
    assert set(seconds) == {"test_long.py", "test_short.py"}
    assert 0.1 <= seconds["test_long.py"] < 10
    assert seconds["test_short.py"] < 0.1


def test_the_record_names_modules_that_exist(script):
    record = script("quick_tests").read_record()
    assert record
    assert [name for name in record if not (ROOT / name).exists()] == []


def test_names_of_modules(script):
    quick = script("quick_tests")
    assert quick.name_module(Path("deploy/bundle/__init__.py")) == "cmt_edge.deploy.bundle"
    assert quick.name_module(Path("src/cmt_edge/__init__.py")) == "cmt_edge"
    assert quick.name_module(Path("cmt/layers.py")) == "cmt_edge.cmt.layers"
    assert quick.name_module(Path("tests/helpers/paths.py")) == "helpers.paths"
    assert quick.name_module(Path("tests/cmt/test_cvt.py")) == "tests.cmt.test_cvt"
    assert quick.name_module(Path("scripts/code_figures.py")) is None
    assert quick.name_module(Path("cmt/data/imagenet_labels.txt")) is None


def test_an_unknown_base_changes_nothing(script):
    assert script("quick_tests").changed_files("no-such-commit") == []


def test_figures_of_a_file(script, tmp_path, capsys):
    figures = script("code_figures")
    (tmp_path / "sample.py").write_text(SAMPLE, encoding="utf-8")
    (tmp_path / "again").symlink_to(tmp_path, target_is_directory=True)
    assert figures.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "files              1\n" in out
    assert "lines of code      3\n" in out, "LIMIT = 3; def grow(value):; return value + LIMIT"
    assert f"tokens a line      {(3 + 6 + 4) / 3:.2f} (mean)" in out
    assert "functions          1, 0 of them over 40 lines" in out
    assert f"    3  {tmp_path / 'sample.py'}:grow:9" in out


def test_figures_of_nothing(script, tmp_path, capsys):
    assert script("code_figures").main([str(tmp_path)]) == 2
    assert "no Python file was found" in capsys.readouterr().err


def test_every_extra_for_users_is_tried(script):
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11, which reads TOML")
    wheel = script("try_wheel")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    users = {name for name in project["optional-dependencies"] if not name.startswith("test")}
    assert {extra for extras in wheel.JOBS for extra in extras.split(",")} == users | {""}
    assert all(wheel.JOBS.values())


@pytest.mark.parametrize(
    ("code", "text", "problem"),
    [
        (3, "no runtime", ""),
        (0, "no runtime", "exit code 3, wanted exit code 0 and 'no runtime'"),
        (3, "another text", "exit code 3, wanted exit code 3 and 'another text'"),
    ],
)
def test_a_job_needs_its_exit_code_and_its_text(script, tmp_path, monkeypatch, code, text, problem):
    wheel = script("try_wheel")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    program = "import os, sys; print(os.environ.get('PYTHONPATH', 'no runtime')); sys.exit(3)"
    job = wheel.Job(("python", "-c", program), code, text)
    found = wheel.try_job(job, tmp_path, tmp_path)
    assert problem in found
    assert bool(found) == bool(problem)


def test_the_version_of_the_wheel_must_be_told_everywhere(script):
    jobs = script("try_wheel").tell_version(Path("cmt_edge-0.1.1.dev3+g1a2b3c4d5-py3-none-any.whl"))
    assert [job.text for job in jobs] == ["cmt-edge 0.1.1.dev3+g1a2b3c4d5\n", "0.1.1.dev3+g1a2b3c4d5\n"]


def test_sizes_of_what_is_installed(script, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    sizes = script("installed_size")
    for name, size in (("large", 3 << 20), ("small", 1000), ("pip", 5 << 20)):
        (tmp_path / f"{name}-1.dist-info").mkdir()
        (tmp_path / f"{name}-1.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: 1\n")
        (tmp_path / f"{name}.so").write_bytes(bytes(size))
        (tmp_path / f"{name}.pyc").write_bytes(bytes(7))
        record = "".join(f"{file},,\n" for file in (f"{name}.so", f"{name}.pyc", "gone.py"))
        (tmp_path / f"{name}-1.dist-info" / "RECORD").write_text(record)
    found = sizes.measure_packages(tmp_path)
    assert found == {"large 1": 3 << 20, "small 1": 1000}
    table = sizes.make_table(found)
    assert "large 1" in table
    assert [line.split()[-1] for line in table.splitlines()[2:]] == ["3.0", "0.0", "3.0"]


def test_an_extra_without_a_job_is_refused(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script("try_wheel").main(["openvino", "opnvino"])
    assert stop.value.code == 2
    assert "no job for the extras opnvino; known are: openvino" in capsys.readouterr().err


# --- show_step ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("Collecting numpy==2.4.6 (from -r requirements/locked.txt (line 3))", "collecting numpy"),
        ("  Downloading torch-2.13.0-cp311.whl.metadata (183.3 MB)", "downloading torch-2.13.0-cp311.whl"),
        ("Installing collected packages: a, b, c", "installing 3 packages"),
        ("Requirement already satisfied: pip", ""),
    ],
)
def test_a_line_of_pip_in_few_words(script, line, words):
    assert script("show_step").describe(line).startswith(words)


def test_a_step_is_silent_in_a_log_and_its_failure_is_not():
    show = [sys.executable, str(ROOT / "scripts" / "show_step.py"), "a step", sys.executable, "-c"]
    done = subprocess.run([*show, "print('much')"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = subprocess.run([*show, "exit('no such package')"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: a step: exit code 1\nno such package\n")


def test_the_line_of_a_step_fits_the_terminal_and_cannot_steer_it(script):
    step = script("show_step").Step("a step", [sys.executable, "-c", "pass"])
    assert step.wait(show=False) == 0
    step.busy = "collecting \x1b[31m" + "x" * 200
    assert len(step.write_line(60)) == 59
    assert "\x1b" not in step.write_line(60)
