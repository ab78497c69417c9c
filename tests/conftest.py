"""Options and fixtures shared by all tests."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--k2-files",
        default=str(ROOT.parent / "shared" / "k2"),
        help="directory with Kimi K2's published config.json, tiktoken.model, tokenizer_config.json and templates/",
    )


@pytest.fixture(scope="session")
def k2_files(request: pytest.FixtureRequest) -> Path:
    """K2's own small files, which the project does not carry."""
    path = Path(request.config.getoption("--k2-files"))
    if not (path / "tiktoken.model").is_file():
        pytest.skip(f"Kimi K2's tokenizer files are not in {path}; give their directory with --k2-files")
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint in K2's format, small enough to load in a moment. Not to be written to."""
    from hybrid.synth import synthesize

    return synthesize(tmp_path_factory.mktemp("models") / "tiny", "tiny", {"n_routed_experts": 32}, seed=1)
