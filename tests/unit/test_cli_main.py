"""The `hybrid` command as a process: help without heavy imports, exit codes, one clear message."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

import cli.main
from hybrid import __version__
from offload.errors import HybridError, UsageError


def hybrid(*arguments: str, stdin: str = "") -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", "from cli.main import main; main()", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120)


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys, contextlib\n"
        "sys.argv = ['hybrid', '--help']\n"
        "from cli.main import main\n"
        "with contextlib.suppress(SystemExit): main()\n"
        "heavy = {'torch', 'numba', 'numpy', 'prompt_toolkit', 'uvicorn', 'starlette', 'tiktoken', 'jinja2'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)\n"
    )
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - begin < 5  # measured: 0.2 s
    for command in ("chat", "complete", "serve", "inspect", "synth", "bench"):
        assert f"  {command} " in done.stdout


def test_version() -> None:
    assert hybrid("--version").stdout == f"hybrid {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nonsense"], "No such command"),
        (["chat", "--device", "tpu"], "tpu"),
        (["complete"], "Missing argument"),
        (["complete", "a", "b", "c"], "3 arguments"),
        (["complete", "--max-tokens", "0", "x"], "max-tokens"),
        (["complete", "--top-p", "0", "x"], "top_p"),
        (["chat", "/no/such/model"], "standard input is empty"),
        (["inspect", "/no/such/model"], "/no/such/model"),
        (["complete", "/no/such/model", "hi"], "/no/such/model"),
    ],
)
def test_bad_usage_is_one_message_and_exit_code_2(arguments: list[str], says: str) -> None:
    done = hybrid(*arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_debug_shows_where() -> None:
    done = hybrid("--debug", "complete", "/no/such/model", "hi")
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_stdin_must_be_text(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from cli.main import main; main()", "complete", str(tmp_path), "-"]
    done = subprocess.run(command, input=b"\xff\xfe", capture_output=True, timeout=60)
    assert done.returncode == 2
    assert b"not UTF-8" in done.stderr


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (UsageError("bad file. Fetch it again."), 2, "hybrid: bad file. Fetch it again.\n"),
        (HybridError("worker died"), 1, "hybrid: worker died\n"),
        (ZeroDivisionError("oh"), 1, "hybrid: ZeroDivisionError: oh (hybrid --debug ... shows where)\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_failures(
    error: BaseException,
    code: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(cli.main, "app", fail)
    with pytest.raises(SystemExit) as caught:
        cli.main.main()
    assert caught.value.code == code
    assert capsys.readouterr().err == says


def test_a_closed_pipe_is_quiet() -> None:
    pipeline = f"{sys.executable} -c 'from cli.main import main; main()' chat --help | true"
    done = subprocess.run(["bash", "-c", pipeline], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
