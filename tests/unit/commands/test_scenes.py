import pytest

import main


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "error: expected a sub-command of `main.py scenes`, one of pack-base; got none"),
        (["nonsense"], "error: argument subcommand: invalid choice: 'nonsense'"),
        (["pack-base"], "error: the following arguments are required: scorer"),
        (["pack-base", "--scorer=a", "--generator=b", "--typo=c"], "error: unrecognized arguments"),
    ],
)
def test_errors_are_one_line_with_a_code(capsys, argv, message):
    assert main.main(["scenes", *argv]) == 78
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1
    assert "see `python main.py scenes" in error
