"""Verbs, help and exit statuses."""

import os
import signal
import subprocess
import sys
import time
import types

import pytest

import posttrain
from posttrain import cli
from posttrain.errors import DataError, Stopped


def run(*argv: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "posttrain", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment})


@pytest.fixture
def called(monkeypatch):
    """Stand-ins for the verbs' functions; what they were called with."""
    calls = []
    for name, verb in cli.VERBS.items():
        module, _, function = verb.function.partition(":")
        stand_in = types.ModuleType(module)
        setattr(stand_in, function, lambda given, name=name: calls.append((name, given)))
        monkeypatch.setitem(sys.modules, module, stand_in)
    return calls


@pytest.fixture
def failing(monkeypatch):
    """Makes `posttrain doctor` raise."""

    def failing(error):
        def doctor(argv):
            raise error

        stand_in = types.ModuleType("posttrain.tools.doctor")
        stand_in.doctor = doctor
        monkeypatch.setitem(sys.modules, "posttrain.tools.doctor", stand_in)

    return failing


def test_help_is_fast_and_light():
    seconds = []
    for _ in range(3):  # the fastest of three: other work on the machine is not the tool's fault
        started = time.monotonic()
        done = run("--help")
        seconds.append(time.monotonic() - started)
    assert min(seconds) < 1
    assert done.returncode == 0
    for word in (*cli.VERBS, "stage=NAME", "pretrain", "sft", "lora", "qlora", "examples"):
        assert word in done.stdout
    heavy = "import sys, posttrain.cli as c; c.main(['--help']); c.main(['chat', '--help']); c.main(['plan', '-h']); "
    heavy += "print([m for m in ('torch', 'hydra', 'numpy', 'transformers') if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == "[]"


@pytest.mark.parametrize("argv", [["help"], ["--help"], ["-h"], ["stage=sft", "--help"]])
def test_first_screen(argv, capsys):
    assert cli.main(argv) == 0
    assert capsys.readouterr().out.startswith("posttrain: ")


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_each_verb(verb, capsys):
    assert cli.main([verb, "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: posttrain {verb}")
    assert ("max_grad_norm" in said and "train_on" in said) == cli.VERBS[verb].takes_config


@pytest.mark.parametrize("verb", ["chat", "merge"])
def test_help_names_the_options_that_the_tool_parses(verb, capsys):
    module = pytest.importorskip(f"posttrain.tools.{verb}")
    options = [o for action in module._parser()._actions for o in action.option_strings if o.startswith("--")]
    assert all(option in cli.VERBS[verb].options for option in options if option != "--help")


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"posttrain {posttrain.__version__}\n"


@pytest.mark.parametrize("verb", [name for name, verb in cli.VERBS.items() if verb.takes_config])
def test_config_verbs_get_a_config(called, verb):
    assert cli.main([verb, "stage=lora"]) == 0
    ((name, config),) = called
    assert (name, config.adapter.name, config.overrides) == (verb, "lora", ["stage=lora"])


@pytest.mark.parametrize("verb", [name for name, verb in cli.VERBS.items() if not verb.takes_config])
def test_other_verbs_get_their_arguments(called, verb):
    assert cli.main([verb, "runs/a", "--seed", "3", "--debug"]) == 0
    assert called == [(verb, ["runs/a", "--seed", "3"])]


@pytest.mark.parametrize("argv", [[], ["stage=pretrain"], ["--config-dir", "."]])
def test_no_verb_means_train(called, argv):
    assert cli.main(argv) == 0
    assert [name for name, _ in called] == ["train"]


def test_run_from_python(called):
    posttrain.run(["stage=lora"])
    ((name, config),) = called
    assert (name, config.adapter.name) == ("train", "lora")


def test_unknown_verb(capsys):
    assert cli.main(["inspct"]) == 2
    said = capsys.readouterr().err
    assert "did you mean posttrain inspect?" in said
    assert "doctor" in said


@pytest.mark.parametrize("verb", ["train", "eval"])
def test_processes_are_checked_under_a_launcher(called, monkeypatch, capsys, verb):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert cli.main([verb, "run.processes=2"]) == 2
    assert "the launcher started 1" in capsys.readouterr().err
    assert cli.main(["plan", "run.processes=2"]) == 0
    assert [name for name, _ in called] == ["plan"]


@pytest.mark.parametrize("verb", [name for name, verb in cli.VERBS.items() if verb.takes_config])
def test_processes_are_started_where_several_work_together(called, monkeypatch, verb):
    launched = []
    monkeypatch.setattr(cli, "launch", lambda *given: launched.append(given) or 143)
    ranked = verb in ("train", "eval")
    assert cli.main([verb, "run.processes=2", "--debug"]) == (143 if ranked else 0)
    assert launched == ([([verb, "run.processes=2", "--debug"], 2)] if ranked else [])
    assert len(called) == (not ranked)
    assert cli.main([verb, "run.processes=1"]) == 0
    assert len(launched) == ranked


def test_users_mistake_in_a_few_lines(failing, capsys):
    failing(DataError("the row is bad"))
    assert cli.main(["doctor"]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "posttrain: error: the row is bad\n")


@pytest.mark.parametrize("how", ["option", "environment"])
def test_debug_shows_the_traceback(failing, capsys, monkeypatch, how):
    failing(DataError("the row is bad"))
    if how == "environment":
        monkeypatch.setenv("POSTTRAIN_DEBUG", "1")
    assert cli.main(["doctor", *(["--debug"] if how == "option" else [])]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_other_ranks_stay_silent(failing, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    failing(DataError("the row is bad"))
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Stopped(signal.SIGINT, "r"), 130),
        (Stopped(signal.SIGTERM, "r"), 143),
        (KeyboardInterrupt(), 130),
        (RuntimeError("ours"), 1),
        (AssertionError(), 1),
    ],
)
def test_exit_status(failing, capsys, error, status):
    failing(error)
    assert cli.main(["doctor"]) == status
    assert ("Traceback" in capsys.readouterr().err) == (status == 1)


def test_mistake_from_the_shell(tmp_path):
    done = run("stage=sft", "optim.learning_rate=1e-4")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "did you mean optim.lr?" in done.stderr
    assert "Traceback" in run("stage=nope", POSTTRAIN_DEBUG="1").stderr
