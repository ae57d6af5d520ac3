import polars as pl
import pytest
import torch

from interp.attribution.scores import HeadScores
from interp.evaluation import UsageReport
from interp.records import Records


def usage():
    return UsageReport(pl.DataFrame({"usage": ["memory"], "subject": ["Peru"]}))


def head_scores():
    return {"m": HeadScores(torch.zeros(1, 2, 2), ("a",), ("Peru",), "path_patching", "m", "tiny", "d", {})}


@pytest.mark.parametrize(("kind", "result"), [("json", lambda: [1]), ("usage", usage), ("head_scores", head_scores)])
def test_a_mended_step_is_computed_again_and_no_other(tmp_path, kind, result):
    computed = []

    def step(name, version):
        def compute():
            computed.append((name, version))
            return result()

        getattr(Records(tmp_path, model="fingerprint"), kind)(name, ["data"], compute, version=version)

    for version in (1, 1, 2, 2, (2, 1), (2, 1)):
        step("mended", version)
        step("other", 1)
    assert computed == [("mended", 1), ("other", 1), ("mended", 2), ("mended", (2, 1))]


def test_a_step_without_a_version_is_refused(tmp_path):
    with pytest.raises(TypeError, match="version"):
        Records(tmp_path).json("step", [], list)  # pyright: ignore[reportCallIssue]


def test_another_model_has_records_of_its_own(tmp_path):
    places = {Records(tmp_path, model=name).place("step", [], ".json", version=1) for name in "ab"}
    assert len(places) == 2
