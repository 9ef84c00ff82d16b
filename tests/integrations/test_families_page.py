"""docs/families.md says what the models do."""

import family_table


def test_the_page_of_families_is_what_the_models_do():
    assert family_table.PAGE.read_text() == family_table.page()
