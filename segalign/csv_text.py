"""Text in cells of CSV files, which spreadsheets take for more than text."""

_FORMULA_SIGNS = ("=", "+", "-", "@", "\t", "\r")


def plain_cell(text: str) -> str:
    """Return text as a spreadsheet shows it: what would be a formula there gets an apostrophe.

    Args:
        text: A name or caption of whatever origin; numbers are not to be passed.
    """
    return f"'{text}" if text.startswith(_FORMULA_SIGNS) else text
