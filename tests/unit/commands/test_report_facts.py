"""Numbers on the page of `megatron-lpr report` that are reckoned from a run's files."""

from types import SimpleNamespace

from megatron_lpr.training import run_report


def test_what_is_read_and_where():
    """Shares of a mixture, what of the tokens was replayed, the ranks that are left for data."""
    sections = {
        "data": {
            "mixture": {"expanded": 3, "original": 1},
            "schedule": [{"from_sample": 10, "mixture": {"expanded": 9, "original": 1}}],
        },
        "parallel": {"tensor": 2, "context": 2, "pipeline": 1, "expert": 4},
    }
    run = SimpleNamespace(
        section=lambda name: sections.get(name, {}),
        files=SimpleNamespace(start={"world_size": 16}),
        roles={"hu": "expanded", "en": "original"},
        tokens={"hu": 60, "en": 20},
        stage1_tokens=1000,
    )
    assert list(run_report.mixture(run)) == [
        "from sample 0: expanded 75%, original 25%",
        "from sample 10: expanded 90%, original 10%",
    ]
    assert run_report.environment(run)["layout"] == "tensor 2, context 2, expert 4, data 4"
    told = "20 tokens of original languages, 25% of what the run has read, 2% of stage 1's 1,000"
    assert run_report._replayed(run) == told
