"""What is on record as judged is what was judged: the same sources, by the same compiler."""

import record


def test_sources_and_compiler_are_what_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "ROOT", tmp_path)
    sources = [tmp_path / "a.py", tmp_path / "b.py"]
    for source in sources:
        source.write_text("x = 1\n")
    found = record.fingerprint(sources, "triton 3.9.0")
    assert found == record.fingerprint([*reversed(sources), tmp_path], "triton 3.9.0")
    assert found != record.fingerprint(sources, "triton 3.6.0")
    assert found != record.fingerprint(sources[:1], "triton 3.9.0")
    sources[1].write_text("x = 2\n")
    assert found != record.fingerprint(sources, "triton 3.9.0")


def test_a_gate_knows_its_own_record_alone(tmp_path):
    file = tmp_path / "judged.json"
    assert not record.is_judged("triton", "1", file)
    record.write("triton", "1", file)
    record.write("nvcc", "2", file)
    record.write("triton", "3", file)
    assert record.is_judged("triton", "3", file) and record.is_judged("nvcc", "2", file)
    assert not record.is_judged("triton", "1", file) and not record.is_judged("nvcc", "3", file)
