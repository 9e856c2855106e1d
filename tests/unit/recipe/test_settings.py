"""What the configuration promises of itself."""

import dataclasses

import pytest

from megatron_lpr.recipe import settings as config

SECTIONS = [value for value in vars(config).values() if dataclasses.is_dataclass(value)]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_sections_are_frozen_keyword_only_and_documented(section):
    parameters = section.__dataclass_params__
    assert parameters.frozen and section.__doc__
    for field in dataclasses.fields(section):
        assert field.kw_only and field.metadata["doc"], field.name


def test_default_mappings_are_not_shared():
    one, other = (config.DataConfig(manifest="m") for _ in range(2))
    assert one.mixture == other.mixture and one.mixture is not other.mixture
