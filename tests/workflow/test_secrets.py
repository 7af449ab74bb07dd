"""What the environment hides stays there: no result, log, report, trace or record of the workflow holds it."""

import gzip

from .conftest import SECRETS


def test_no_file_of_a_study_holds_a_secret_of_its_environment(finished):
    places = [finished.root / name for name in ("results", "logs", ".snakemake")]
    files = [path for place in places for path in place.rglob("*") if path.is_file()]
    assert any(path.name == "report.html" for path in files)
    assert any(path.name.startswith("trace.") for path in files)
    found = []
    for path in files:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        found += [f"{secret} in {path}" for secret in SECRETS.values() if secret.encode() in content]
    assert found == []
