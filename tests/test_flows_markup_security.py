"""What a label or a path says is printed as it is, never read as rich's markup."""

from flows.commands.printing import print_table


def test_brackets_in_a_value_are_no_markup(capsys):
    print_table([{"name": "[/x] [red]y", "rows": 3}])
    assert "[/x] [red]y" in capsys.readouterr().out
