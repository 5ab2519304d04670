from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.native import ANSWER, Compiler, write_sources


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep libraries in a cache of the test's own; return the folder of their entries."""
    monkeypatch.setenv("FXPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FXPRUNE_NATIVE", raising=False)
    return tmp_path / "cache" / "native"


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Return a folder of small sources that make one library."""
    folder = write_sources(tmp_path / "sources", answer=ANSWER)
    (folder / "answer.h").write_text("#define ANSWER 42\n", encoding="utf-8")
    return folder


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """Put a compiler in place that counts what it compiles."""
    stand_in = Compiler(tmp_path)
    monkeypatch.setenv("CXX", str(stand_in.path))
    return stand_in
