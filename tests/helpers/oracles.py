"""What is computed a second time, the plain way."""


def first_stop(text, stops):
    """Return where the stop string begins that is completed first; None: there is none.

    Of several that the same letter completes it is the longest.
    """
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return min(starts)
    return None
