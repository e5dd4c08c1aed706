"""Bad input: the one error whose message is written for whoever runs the program."""


class BadInput(ValueError):
    """A request that cannot be met; the message says why, and what would be right.

    Every room raises it: for a field of a recipe, a file, images, weights or a cluster that does
    not fit. Commands show its message alone and exit with 2. It stays a ValueError for callers of
    the library, and keeps its type through pickles, so it is known for what it is in whichever
    process it is caught. A plain ValueError of ours is about our own calls: a bug.
    """
