"""The progress line."""

import io
import re

import pytest

from megatron_lpr.reporting.progress import Progress, progress_line

METRICS = {
    "step": 9,
    "steps": 24,
    "stage": "stage 1",
    "ntp_loss": 1.5123,
    "balance_loss": 1.0031,
    "lpr_loss": None,
    "grad_norm": 0.8191,
    "lr": 4.94e-4,
    "tokens": 1024,
    "tokens_per_second": 1024.4,
    "tokens_per_language": {"hu": 9216, "en": 0},
    "seconds": 1.0,
    "consumed_samples": 36,
}


def test_stage_1_line():
    assert progress_line(METRICS, seconds_per_step=10.7) == (
        "stage 1   37% step  9/24  ntp 1.512  balance 1.003  gnorm 0.82  lr 4.9e-04  "
        "1,024 tok/s  hu 9.2k en 0  ETA 2:40"
    )


def test_stage_2_line_has_the_lpr_loss():
    review = METRICS | {"step": 24, "stage": "stage 2", "balance_loss": None, "lpr_loss": 0.6341}
    assert progress_line(review, seconds_per_step=10.7) == (
        "stage 2  100% step 24/24  ntp 1.512  lpr 0.634  gnorm 0.82  lr 4.9e-04  1,024 tok/s  hu 9.2k en 0  ETA 0:00"
    )


def test_what_devices_compute_is_shown_where_it_is_known():
    fast = METRICS | {"tflops_per_device": 312.44, "mfu": 0.3158}
    assert "  1,024 tok/s  312 TFLOP/s  MFU 31.6%  hu" in progress_line(fast, seconds_per_step=1)


@pytest.mark.parametrize(
    ("bits", "retention", "text"),
    [
        ({"hu": 1.0211, "en": 0.98}, {"en": 99.14}, "hu 1.021, en 0.980 (99.1% kept)"),
        ({"hu": 1.0211}, {}, "hu 1.021"),
        ({f"l{n}": n / 2 for n in range(1, 6)}, {"l1": 97.0, "l2": 96.94}, "mean 1.500 (least kept l2 96.9%)"),
        ({f"l{n}": n / 2 for n in range(1, 6)}, {}, "mean 1.500"),
    ],
)
def test_a_validation_is_in_the_line(bits, retention, text):
    validated = METRICS | {"validation": {"bits_per_byte": bits, "retention": retention}}
    assert f"  balance 1.003  held out {text}  gnorm" in progress_line(validated, seconds_per_step=1)


def test_the_line_does_not_grow_with_the_languages():
    few, many = ({f"l{n}": 10**6 for n in range(count)} for count in (16, 200))
    assert "  l0 1.0M l1 1.0M" in progress_line(METRICS | {"tokens_per_language": few}, seconds_per_step=1)
    assert "  200 languages 200.0M  ETA" in progress_line(METRICS | {"tokens_per_language": many}, seconds_per_step=1)


def test_a_skipped_step_says_so():
    line = progress_line(METRICS | {"ntp_loss": float("nan"), "skipped": "why"}, seconds_per_step=1)
    assert "24  skipped  ntp nan  balance" in line


def test_lines_have_the_time_and_stay_lines():
    stream = io.StringIO()
    Progress(stream).report(METRICS)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ  stage 1   37%.*\n", stream.getvalue())


@pytest.mark.parametrize(
    ("losses", "text"),
    [
        ({"hu": 1.6021, "en": 1.4225}, "  ntp 1.512 (hu 1.602 en 1.423)  balance"),
        ({"hu": 1.5123}, "  ntp 1.512  balance"),  # nothing new
        (dict.fromkeys("abcde", 1.5123), "  ntp 1.512  balance"),  # too long
    ],
)
def test_a_few_languages_have_their_losses(losses, text):
    assert text in progress_line(METRICS | {"ntp_loss_per_language": losses}, seconds_per_step=1)


@pytest.mark.parametrize(
    ("steps", "seconds", "eta"),
    [(10, 59.4, "0:59"), (10, 59.6, "1:00"), (10, 3723, "1:02:03"), (33, 3723.0, "1d 00:49:12")],
)
def test_eta(steps, seconds, eta):
    record = METRICS | {"steps": steps, "step": 9}
    assert progress_line(record, seconds_per_step=seconds).endswith(f"  ETA {eta}")


@pytest.mark.parametrize(
    ("count", "text"),
    [(999, "999"), (1000, "1.0k"), (138_000_000, "138.0M"), (8_000_000_000, "8.0G"), (2 * 10**12, "2.0T")],
)
def test_counts_are_short(count, text):
    assert f"  hu {text}  " in progress_line(METRICS | {"tokens_per_language": {"hu": count}}, seconds_per_step=1)


def test_eta_reckons_with_what_happens_between_steps(monkeypatch):
    """Every second step is followed by a validation of 30 seconds: 40 steps take 40 x 2 + 20 x 30 seconds."""
    stream, clock = io.StringIO(), [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    progress = Progress(stream, window=1)
    for step in range(1, 42):
        clock[0] += 2.0 + (30.0 if step % 2 == 0 else 0.0)
        progress.report(METRICS | {"step": step, "steps": 81, "seconds": 2.0})
    assert stream.getvalue().endswith("  ETA 11:20\n")


def test_eta_is_a_moving_average_and_lines_are_plain():
    stream = io.StringIO()
    progress = Progress(stream, window=2)
    for step, seconds in [(1, 100.0), (2, 10.0), (3, 20.0)]:
        progress.report(METRICS | {"step": step, "steps": 5, "seconds": seconds})
    lines = stream.getvalue().splitlines()
    # Means of the last two steps, times the steps left: 100 * 4, 55 * 3, 15 * 2.
    assert [line.rsplit("ETA ")[1] for line in lines] == ["6:40", "2:45", "0:30"]
    assert "\r" not in stream.getvalue() and stream.getvalue().endswith("\n")
