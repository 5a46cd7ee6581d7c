"""The interpreter's tests run where something has changed, and only what has passed is put on record."""

import sys
from functools import partial

import builds
import interpret
import pytest
import record


@pytest.fixture
def main(tmp_path, monkeypatch):
    """main(status, *arguments): what the script exits with where the tests would end with `status`, and whether they
    ran."""
    file = tmp_path / "judged.json"
    for name in ("is_judged", "write"):
        monkeypatch.setattr(record, name, partial(getattr(record, name), file=file))

    def main(status, *arguments):
        ran = []

        def run_pytest(*_, **__):
            ran.append(True)
            if status != 0:
                raise SystemExit(status)

        monkeypatch.setattr(builds, "run_pytest", run_pytest)
        monkeypatch.setattr(sys, "argv", ["interpret.py", *arguments])
        try:
            interpret.main()
        except SystemExit as stopped:
            return stopped.code, bool(ran)
        return 0, bool(ran)

    return main


def test_what_has_passed_does_not_run_again_unless_it_is_asked_for(main):
    assert main(0) == (0, True)
    assert main(0) == (0, False)
    assert main(1, "--full") == (1, True)


def test_what_has_failed_runs_again(main):
    assert main(1) == (1, True)
    assert main(0) == (0, True)


def test_another_triton_runs_again(main, monkeypatch):
    main(0)
    monkeypatch.setattr(interpret, "version", lambda name: "0.0")
    assert main(0) == (0, True)
