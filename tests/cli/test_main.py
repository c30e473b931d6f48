"""Help, version, exit statuses, signals, and the flags that a verb does not take."""

import os
import re
import signal
import subprocess
import sys

import pytest

from llama_jax.cli.console import keeping_interrupts
from llama_jax.cli.flags import FLAGS
from llama_jax.cli.help import help_text
from llama_jax.cli.verbs import PARAMETERS, VERBS
from llama_jax.engine.parameters import SCHEMAS
from llama_jax.errors import InputError
from llama_jax.version import __version__
from tests.helpers import ROOT
from tests.helpers.commands import PARIS, PARIS_ANSWER, run_py

COMMAND = "from llama_jax.cli.main import entry; entry()"
"""What the installed command `llama-jax` runs."""
FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")


def flags_in(help_text):
    return set(re.findall(r"^  --(?:\[no\])?(\w+)", help_text, re.MULTILINE))


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_every_flag_of_the_verb_and_no_other(cli, verb):
    status, out, err = cli(*[verb] * bool(verb), "-h")
    assert (status, err) == (0, "")
    ours = [VERBS[verb]] if verb else VERBS.values()
    taken = {name for each in ours for name in each.takes}
    assert flags_in(out) == taken | {"helpfull", "version"}
    assert all(len(line) <= 80 for line in out.splitlines())


@pytest.mark.usefixtures("cli")
@pytest.mark.parametrize(
    ("path", "program"), [("/x/run.py", "python run.py"), ("/x/llama-jax", "llama-jax")]
)
def test_help_names_the_program_as_it_was_called(path, program):
    assert f"\n  {program} --prompt=TEXT [flags] " in help_text([path])


def test_helpfull_has_the_flags_of_absl():
    assert {"stderrthreshold", "flagfile", "prompt", "port"} <= flags_in(
        run_py("--helpfull").stdout
    )


@pytest.mark.usefixtures("cli")
@pytest.mark.parametrize("name", PARAMETERS)
def test_defaults_and_ranges_are_those_of_the_parameters(name):
    schema, flag = SCHEMAS[name], FLAGS[name]
    if name == "max_tokens":  # its default may shrink, so a flag that is not given has no value
        assert (flag.default, "Default: 256, or" in flag.help) == (None, True)
    else:
        assert (flag.default or None) == (schema.get("default") or None)
    bounds = [str(schema[key]) for key in ("minimum", "maximum") if key in schema]
    expected = " to ".join(bounds).replace(str(2**64 - 1), "2^64 - 1")
    assert expected in flag.help


def test_version_is_printed_without_a_device():
    done = run_py("--version", env=os.environ | {"JAX_PLATFORMS": "none-such"})
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(rf"llama_jax {__version__} \(jax [\d.]+\w*, Python [\d.]+\)\n", done.stdout)


def test_the_installed_command_does_what_run_py_does(tmp_path):
    """From another folder, too."""
    arguments = [PARIS, "--temperature=0"]
    command = [sys.executable, "-c", COMMAND, *arguments]
    options = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    installed = subprocess.run(command, capture_output=True, text=True, timeout=120, **options)
    assert (installed.returncode, installed.stdout) == (0, PARIS_ANSWER)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["hello"],
            "got the argument 'hello', expected chat, batch, score, sweep, replay FILE,",
        ),
        (
            ["chat", "serve"],
            "got the argument 'chat serve', expected chat, batch, score, sweep, replay FILE, ",
        ),
        (["--prompt=a", "--promt=b"], "Unknown command line flag 'promt'"),
        (["--prompt=a", "--temperature=hot"], "flag --temperature=hot"),
        (
            ["--prompt=a", "--input=x"],
            "--input is given with a prompt, but belongs to batch and score",
        ),
        (["--prompt=a", "--port=1"], "--port is given with a prompt, but belongs to serve; drop"),
        (["batch", "--port=1"], "--port is given with batch, but belongs to serve; drop it"),
        (["batch", "--top_k=1"], "--top_k is given with batch, whose requests are in --input"),
        (["serve", "--prompt=a"], "--prompt is given with serve, whose requests come over HTTP"),
        (["chat", "--prompt=a"], "--prompt is given with chat, which reads turns from stdin"),
        (["chat", "--nostream"], "--stream is given with chat, which reads turns from stdin"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_one_line_and_exit_2(mistake, arguments, expected):
    assert expected in mistake(*arguments)


def test_debug_shows_the_traceback(cli):
    with pytest.raises(InputError, match="prompt is empty"):
        cli("--prompt=", "--debug")


@pytest.mark.slow
def test_a_reader_that_closes_stdout_is_no_error():
    read, write = os.pipe()
    os.close(read)
    done = run_py(PARIS, capture_output=False, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


@FULL
@pytest.mark.parametrize(
    ("arguments", "unbuffered"), [([PARIS], ""), ([PARIS, "--output=json"], "1"), (["--help"], "")]
)
def test_a_full_disk_under_stdout_is_one_line_and_exit_2(arguments, unbuffered):
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        done = run_py(
            *arguments, capture_output=False, stdout=full, stderr=subprocess.PIPE, env=environment
        )
    assert done.returncode == 2
    said = "error: cannot write stdout (No space left on device); make room for it\n"
    assert done.stderr.endswith(said)
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@FULL
def test_a_full_disk_under_stderr_costs_what_is_said_there_alone():
    with open("/dev/full", "w") as full:
        done = run_py(PARIS, capture_output=False, stdout=subprocess.PIPE, stderr=full)
    assert (done.stdout, done.returncode) == (PARIS_ANSWER, 0)


def test_ctrl_c_while_compiling_exits_130():
    """Where Python's own exit crashed in four of five tries."""
    # A shell that runs these tests in the background has its children ignore SIGINT.
    listen = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "runpy.run_path('run.py', run_name='__main__')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", listen, "--prompt=Hi", "--ignore_eos", "--max_tokens=450"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_LOG_COMPILES": "1"},
    )
    with process:
        # The last thing that JAX logs before XLA compiles the decode step.
        while b"conversion jit(decode)" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err


def test_an_interrupt_that_was_lost_is_raised_again():
    before = signal.getsignal(signal.SIGINT)
    with keeping_interrupts() as check:
        check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            check()
    assert signal.getsignal(signal.SIGINT) is before
