"""What a report says of a check that could not be made, and of many findings."""

from megatron_lpr.conversion.verify.report import Check, check, listed
from megatron_lpr.errors import UserError


def test_what_cannot_be_read_fails_its_check():
    def look():
        raise UserError("it is damaged")

    assert check("files", look, "all there") == Check(name="files", ok=False, detail="it is damaged")


def test_how_many_more_are_told():
    assert listed("abcde") == "a, b, c, d, e" and listed("abcdef") == "a, b, c, d, e and 1 more"
